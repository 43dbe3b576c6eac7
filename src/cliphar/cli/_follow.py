"""How far a training is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cliphar.training import StepReport

__all__ = ["following"]

_LINE_EVERY_S = 15.0
Following = tuple[Callable[[str], None], "Callable[[StepReport], None]"]


@contextmanager
def following() -> Iterator[Following]:
    """Two functions on standard error: one for lines, one for steps."""
    if sys.stderr.isatty():
        with _bar() as functions:
            yield functions
        return
    told = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

    def on_step(report: StepReport) -> None:
        nonlocal told
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            left = timedelta(seconds=round((report.steps - report.step) * report.seconds_per_step))
            rate = f"{report.photos_per_s:.1f} photos/s"
            log(f"step {report.step}/{report.steps}: loss {report.loss:.4f}, {rate}, {left} left")

    yield log, on_step


@contextmanager
def _bar() -> Iterator[Following]:
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
