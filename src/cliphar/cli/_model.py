"""cliphar model: what models there are, and what they say of themselves."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliphar.cli._options import Model, a_path, expand
from cliphar.cli._output import say, tell
from cliphar.errors import BundleError, UsageError, one_line

if TYPE_CHECKING:
    from cliphar.recognizer import Recognizer

__all__ = ["app"]

app = typer.Typer(
    help="List, show, verify, pull, teach and promote models.", no_args_is_help=True, rich_markup_mode=None
)

_Name = Annotated[str | None, typer.Argument(help="A model's name or a bundle's directory.", show_default="mini")]
_Out = Annotated[
    Path, typer.Option("--out", "-o", help="The folder for the changed model; that of --model changes it in place.")
]


@app.command("list")
def list_() -> None:
    """List models, whether they are ready, and where they are."""
    from cliphar.bundle import list_models

    models = list_models()
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        print(f"{model.name:<{width}}  {model.state:<7}  {model.path}")


@app.command()
def show(
    model: _Name = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of bundle.json.")] = False,
) -> None:
    """Print a model's card."""
    from rich.console import Console

    from cliphar.bundle import find_bundle
    from cliphar.evaluation import model_card

    console = Console()
    bundle = find_bundle(model, verify=False)
    if as_json:
        print(json.dumps(json.loads(bundle.info.model_dump_json(exclude_unset=True)), ensure_ascii=False))
        return
    card = "\n".join(map(one_line, model_card(bundle).split("\n")))  # who made the bundle may have written anything
    if sys.stdout.isatty() and console.width >= 80:  # in narrower tables figures would be cut
        from rich.markdown import Markdown

        console.print(Markdown(card))
    else:
        print(card)


@app.command()
def verify(model: _Name = None) -> None:
    """Check every file's digest, and run both graphs once."""
    import numpy as np

    from cliphar.bundle import find_bundle
    from cliphar.recognizer import Recognizer
    from cliphar.runtime import OnnxRuntime

    bundle = find_bundle(model)
    side = bundle.info.image.size
    recognizer = Recognizer(bundle, OnnxRuntime(bundle))
    recognizer.predict(np.zeros((side, side, 3), np.uint8), ["standing", "an action nobody trained"])
    size = sum(file.bytes for file in bundle.info.files.values())
    print(f"{bundle.info.name}: {len(bundle.info.files)} files, {size / 2**20:.1f} MiB, all as they should be")


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="The model to download.")],
    source: Annotated[str | None, typer.Option("--from", help="A file, folder or URL to take it from instead.")] = None,
) -> None:
    """Download a model, check it and put it in place.

    MODEL is clip-b16; or, with cliphar[train], clip-vit-b32, siglip2-b16, mobileclip2-s0 or open_clip:ARCHITECTURE/TAG.
    """
    from cliphar.bundle import PULLS
    from cliphar.bundle import pull as fetch

    if model in PULLS:
        bundle = fetch(model, source, say=say)
    elif not find_spec("open_clip"):
        raise BundleError(
            f"nothing to pull for '{model}' here; can be pulled: {', '.join(PULLS)}, and open_clip's models, such as "
            "clip-vit-b32, once they can be read: pip install 'cliphar[train]'"
        )
    else:
        from cliphar.export import pull_open_clip

        bundle = pull_open_clip(model, source, say=say)
    print(f"{bundle.info.name} is ready at {bundle.path}")


@app.command()
def teach(
    name: Annotated[str, typer.Argument(help="The new action, in plain words.")],
    photos: Annotated[list[str], typer.Argument(help="Photos of it, folders of them, or patterns; 8 to 16 work well.")],
    out: _Out,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Teach a model one more action from a few photos. What it knew before does not change."""
    with _to_change(model, out) as recognizer:
        lesson = recognizer.teach(name, expand(photos))
    for error in lesson.refused:
        tell(str(error))
    if as_json:
        print(json.dumps(lesson.to_dict(), ensure_ascii=False))
    else:
        print(f"{out} knows '{lesson.name}' from {lesson.photos} photo{'s' * (lesson.photos > 1)}")
        if lesson.recall is not None:
            others = ", ".join(f"{label} {share:.0%}" for label, share in lesson.confused_with[:3])
            print(
                f"each photo, by what the others teach: {lesson.recall:.0%} right" + (f"; else {others}" * bool(others))
            )
    if lesson.refused:
        raise typer.Exit(1)


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="A taught action; 'cliphar model show' lists them.")],
    out: _Out,
    model: Model = None,
) -> None:
    """Forget a taught action. If it was also trained, the trained one answers again."""
    with _to_change(model, out) as recognizer:
        recognizer.forget(name)
    taught = ", ".join(recognizer.taught) or "none"
    print(f"{out} has forgotten '{name}'; taught are: {taught}")


@contextmanager
def _to_change(model: str | None, out: Path) -> Iterator[Recognizer]:
    """The model, to be changed in the block and then written to ``out``, where nothing but itself may stand."""
    from cliphar.bundle import alone, check_place, find_bundle, write_bundle
    from cliphar.recognizer import TAUGHT_FILE, Recognizer
    from cliphar.runtime import OnnxRuntime

    out = out.resolve() if out.is_symlink() else out  # the link stays one
    check_place(out)
    with alone(out.parent) if out.exists() else nullcontext():
        bundle = find_bundle(model)
        in_place = out.resolve() == bundle.path.resolve()
        if out.exists() and not in_place:
            raise UsageError(f"{out} exists; choose another place, or give it as --model too, to change it")
        recognizer = Recognizer(bundle, OnnxRuntime(bundle))
        yield recognizer
        files: dict[str, Path | bytes] = {name: bundle.file(name) for name in bundle.info.files if name != TAUGHT_FILE}
        with tempfile.TemporaryDirectory() as work:
            if recognizer.taught:
                recognizer.save_taught(taught := Path(work) / TAUGHT_FILE)
                files[TAUGHT_FILE] = taught
            write_bundle(out, bundle.info, files, overwrite=in_place)


@app.command()
def promote(
    candidate: Annotated[str, typer.Argument(help="The model that may take the other's place.")],
    over: Annotated[
        Path, typer.Option(metavar="BUNDLE", help="The bundle, or link to one, to replace; it need not exist yet.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", "-d", parser=a_path, metavar="<path>", help="A folder of LABEL/PHOTO or LABEL/CLIP, new to both."
        ),
    ],
    level: Annotated[float, typer.Option(min=0, max=1, help="The largest p-value that counts as better.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replace a model if another is better. The same photos or clips decide, by McNemar's exact test."""
    from cliphar.bundle import check_place, write_bundle
    from cliphar.cli._eval import answer_all, compare_with, read_labelled
    from cliphar.recognizer import load

    check_place(over)
    listed, labels = read_labelled(data, None)
    recognizer = load(candidate)
    current = load(over.resolve()) if over.exists() else None  # a path, whatever its name
    read, answers, _ = answer_all(recognizer, listed, labels, 0.9, data)
    comparison, lost = None, 0
    if current is not None:
        comparison, lost = compare_with(current, read, answers, labels, 0.9, data)
    better = comparison is None or (comparison.difference > 0 and comparison.p_value <= level)
    counted = len(read) - lost
    promoted = better and counted == len(listed)  # photos that cannot be read decide nothing
    if promoted:
        bundle = recognizer.bundle
        write_bundle(over, bundle.info, {file: bundle.file(file) for file in bundle.info.files}, overwrite=True)
    against = None if comparison is None else comparison.to_dict()
    if as_json:
        print(json.dumps({"promoted": promoted, "n": counted, "against": against}))
    else:
        done = f"{recognizer.bundle.info.name} is now at {over}" if promoted else f"{over} stays as it is"
        why = ": nothing was there"
        if comparison is not None:
            why = f": top1 {comparison.difference:+.3f}, p = {comparison.p_value:.2g}"
        print(f"{done}{why}")
    if counted < len(listed):
        raise typer.Exit(1)
