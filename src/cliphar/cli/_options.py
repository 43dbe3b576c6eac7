"""Options and arguments that several commands share."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cliphar.errors import UsageError

__all__ = [
    "BasePath",
    "Coverage",
    "Drain",
    "Host",
    "Labels",
    "LabelsFile",
    "Model",
    "PagePort",
    "Provider",
    "RootPath",
    "Runtime",
    "Threads",
    "a_path",
    "an_address",
    "chosen_labels",
    "expand",
]


def _prefix(path: str) -> str:
    if not re.fullmatch(r"(/[\w.~-]+)*", path, re.ASCII):
        raise UsageError(f"{path!r} is not a path that a proxy puts before ours; one is like /cliphar or /cliphar/api")
    return path


def an_address(host: str) -> str:
    """As given, if it is not empty: as from a variable that is not set, it would mean every address there is."""
    if not host:
        raise UsageError("--host is empty; give the address to listen on, such as 127.0.0.1, or 0.0.0.0 for all")
    return host


def a_path(path: str) -> Path:
    """As given, if it is not empty: as from a variable that is not set, it would mean the current folder."""
    if not path:
        raise typer.BadParameter("it is empty; give a path, or . for this folder")
    return Path(path)


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
Host = Annotated[str, typer.Option(envvar="CLIPHAR_HOST", help="Address to listen on.", callback=an_address)]
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
Drain = Annotated[
    int,
    typer.Option(envvar="CLIPHAR_DRAIN_S", min=1, help="Seconds to finish the requests that came in before a stop."),
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
    """Files, those wanted inside folders (sorted, subfolders too), and what patterns match, in order.

    A path that does not exist is kept, to be reported with the others; a folder or pattern without any is a UsageError.
    """
    from cliphar.media import files_in, is_image_name

    wanted = is_wanted or is_image_name
    for given in paths:
        matches = [given]
        if glob.has_magic(given) and not os.path.exists(given):  # noqa: PTH110 - Path's raises on too long a name
            matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - patterns may be absolute
        found: dict[Path, str] = {}  # each once: ** gives a folder and what is in it
        for one in matches:
            if os.path.isdir(one):  # noqa: PTH112
                found |= {file: str(file) for file in files_in(Path(one)) if wanted(file.name) or not file.is_file()}
            else:
                found[Path(one)] = one
        if not found:
            raise UsageError(f"no {what} in {given}")
        yield from found.values()
