"""Options and arguments that several commands share."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cliphar.errors import UsageError

__all__ = [
    "BasePath",
    "Coverage",
    "Labels",
    "LabelsFile",
    "Model",
    "PagePort",
    "Provider",
    "RootPath",
    "Runtime",
    "Threads",
    "chosen_labels",
    "expand",
]


def _prefix(path: str) -> str:
    if not re.fullmatch(r"(/[\w.~-]+)*", path, re.ASCII):
        raise UsageError(f"{path!r} is not a path that a proxy puts before ours; one is like /cliphar or /cliphar/api")
    return path


Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", envvar="MODEL_PATH", help="A model's name or a bundle's directory.", show_default="mini"
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--labels", "-l", metavar="<str>", help='Actions to choose from: "cooking, riding a bike".'),
]
LabelsFile = Annotated[Path | None, typer.Option("--labels-file", help="File of actions to choose from, one per line.")]
Coverage = Annotated[
    float, typer.Option(envvar="CLIPHAR_COVERAGE", help="How often the prediction set should hold the true label.")
]
Provider = Annotated[
    str | None,
    typer.Option(envvar="CLIPHAR_PROVIDER", help="cpu, cuda, tensorrt or openvino.", show_default="the best available"),
]
Runtime = Annotated[
    str | None,
    typer.Option(envvar="CLIPHAR_RUNTIME", help="onnx, or what 'cliphar export' added.", show_default="the fastest"),
]
Threads = Annotated[
    int | None,
    typer.Option(envvar="CLIPHAR_THREADS", min=1, help="CPU threads.", show_default="as many as allowed"),
]
PagePort = Annotated[int, typer.Option(envvar="CLIPHAR_APP_PORT", min=1, max=65535, help="The port of the web page.")]
RootPath = Annotated[
    str,
    typer.Option(
        envvar="CLIPHAR_ROOT_PATH",
        callback=_prefix,
        help="Path of the API behind a proxy, such as /cliphar/api.",
        show_default="none",
    ),
]
BasePath = Annotated[
    str,
    typer.Option(
        envvar="CLIPHAR_APP_BASE_PATH",
        callback=_prefix,
        help="Path of the web page behind a proxy, such as /cliphar.",
        show_default="none",
    ),
]


def chosen_labels(labels: list[str] | None, labels_file: Path | None) -> tuple[str, ...] | None:
    """The labels asked for, or None; UsageError if both ways are used or none is left."""
    from cliphar.labels import clean_labels, read_labels_file

    if labels and labels_file is not None:
        raise UsageError("give --labels or --labels-file, not both")
    if labels_file is not None:
        return read_labels_file(labels_file)
    return clean_labels(",".join(labels)) if labels else None


def expand(paths: list[str], is_wanted: Callable[[str], bool] | None = None, what: str = "images") -> Iterator[str]:
    """Files, those wanted inside folders (sorted, subfolders too), and the matches of patterns, in order.

    A path that does not exist is kept, so that it is reported with the others; a folder or a pattern without any is a
    UsageError.
    """
    from cliphar.media import files_in, is_image_name

    wanted = is_wanted or is_image_name
    for given in paths:
        path = Path(given)
        try:
            there, is_folder = path.exists(), path.is_dir()
        except OSError:  # such as a name too long; decoding it says why
            there, is_folder = True, False
        if is_folder:
            inside = [str(p) for p in files_in(path) if wanted(p.name) or not p.is_file()]
            if not inside:
                raise UsageError(f"no {what} in folder {given}")
            yield from inside
        elif not there and glob.has_magic(given):
            matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - patterns may be absolute
            if not matches:
                raise UsageError(f"nothing matches {given}")
            yield from matches
        else:
            yield given
