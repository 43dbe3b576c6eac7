"""cliphar train: a recipe in, a bundle out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliphar.cli._output import say, tell
from cliphar.errors import UsageError

if TYPE_CHECKING:
    from cliphar.training import StepReport

__all__ = ["train"]

_LINE_EVERY_S = 15.0
_Following = tuple[Callable[[str], None], "Callable[[StepReport], None]"]


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in data.source=../photos")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print every setting and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint of a stopped run.")] = False,
    ray: Annotated[
        int | None, typer.Option(min=1, metavar="WORKERS", help="Train on a Ray cluster, in this many processes.")
    ] = None,
) -> None:
    """Train a model from a recipe. Stopped by a signal, it writes a checkpoint and exits with 128 + the signal."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError("training needs torch; run: pip install 'cliphar[train]'") from error
    from cliphar.training import Stopped, Surroundings, first_speaks, is_first, leave_ranks, load_recipe, train_on_ray
    from cliphar.training import train as run

    with first_speaks():
        loaded = load_recipe(recipe, tuple(overrides or ()))
    if show:
        print(loaded.model_dump_json(indent=1))
        return
    try:
        if ray is not None:
            bundle = train_on_ray(loaded, ray, resume=resume)
        else:
            with first_speaks(), _following() as (log, on_step):
                bundle = run(loaded, Surroundings(resume=resume, log=log, on_step=on_step))
    except Stopped as stopped:
        if is_first():
            tell(str(stopped))
        leave_ranks(stopped.status)
        raise typer.Exit(stopped.status) from stopped
    if is_first():
        print(f"{bundle.info.name} is ready at {bundle.path}")
    leave_ranks(0)


@contextmanager
def _following() -> Iterator[_Following]:
    """Functions for lines and for steps, on standard error: a bar on a terminal, a line now and then in a log."""
    if sys.stderr.isatty():
        with _bar() as functions:
            yield functions
        return
    told = time.monotonic()

    def log(line: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} {line}")

    def on_step(report: StepReport) -> None:
        nonlocal told
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            left = timedelta(seconds=round((report.steps - report.step) * report.seconds_per_step))
            rate = f"{report.photos_per_s:.1f} photos/s"
            log(f"step {report.step}/{report.steps}: loss {report.loss:.4f}, {rate}, {left} left")

    yield log, on_step


@contextmanager
def _bar() -> Iterator[_Following]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", visible=False, total=1)

        def on_step(report: StepReport) -> None:
            text = f"loss {report.loss:.4f}  {report.photos_per_s:.1f} photos/s"
            bar.update(task, visible=True, total=report.steps, completed=report.step, description=text)

        def log(line: str) -> None:
            bar.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, highlight=False)

        yield log, on_step
