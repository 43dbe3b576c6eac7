"""Answers for people on a terminal, for pipes, and for files."""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from cliphar.errors import MediaError, UsageError, one_line

if TYPE_CHECKING:
    from cliphar.recognizer import Prediction

__all__ = [
    "Commands",
    "Writer",
    "check_target",
    "escaping",
    "named_error",
    "progress",
    "row_of",
    "say",
    "show",
    "tell",
    "while_read",
]

_BAR = 24


def escaping() -> str:
    """The name of an error handler that writes letters an encoding lacks as JSON's escapes; Python's own do not."""

    def escape(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)  # noqa: S101 - nothing is decoded
        return json.dumps(error.object[error.start : error.end])[1:-1], error.end

    codecs.register_error("cliphar-json", escape)
    return "cliphar-json"


@contextmanager
def while_read(*, go_on: bool = False) -> Iterator[None]:
    """Ends the command well when the reader of its output went away, as in "| head"; typer would exit with 1.

    With ``go_on``, for a command that also writes a file, only what it prints ends.
    """
    try:
        yield
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not go_on:
            raise typer.Exit from error


def say(line: str) -> None:
    """A line on standard error; where it can go nowhere, as in "2>&1 | head" or on a full disk, the work goes on."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """What is wrong, on standard error, whatever it holds."""
    say(f"cliphar: {one_line(line)}")


def named_error(path: str, error: MediaError) -> str:
    """One line that names the photo once."""
    path, text = one_line(path), one_line(str(error))
    if text.startswith("the image "):  # of bytes, as from a shard
        return path + text.removeprefix("the image")
    return text if path in text else f"{path}: {text}"


def show(path: str, prediction: Prediction) -> None:
    """A block with bars on a terminal; one tab-separated line (path, label, score) in a pipe."""
    path = one_line(path)
    if not sys.stdout.isatty():
        print(f"{path}\t{prediction.label}\t{prediction.score:.4f}", flush=True)
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    heading = Text(path, style="bold")
    heading.append(f"  {prediction.label}", style="bold green" if prediction.label != "unknown" else "bold yellow")
    console.print(heading)
    room = console.width - len("      97.7%  in set ")
    width = min(max(cell_len(score.label) for score in prediction.top), max(1, room))
    bar = max(0, min(_BAR, room - width))
    for label, score in prediction.top:
        filled = round(score * bar)
        line = Text(f"  {label}{' ' * (width - cell_len(label))}  ")
        line.append("█" * filled, style="green")
        line.append("░" * (bar - filled), style="dim")
        line.append(f" {score:6.1%}")
        line.append("  in set" if label in prediction.set else "", style="dim")
        console.print(line)


def check_target(path: Path, *kinds: str) -> None:
    """UsageError if no file can be written there, or its name ends in none of these; asked before the work."""
    if kinds and path.suffix not in kinds:
        raise UsageError(f"cannot write {path}: its name must end in {' or '.join(kinds)}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: {path.parent} is not a folder that can be written to")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; give a file's name")


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on the terminal's standard error when there is long work to wait for, unless ``quiet``."""
    if quiet or total < 50 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("photos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("photos", total=total)
        yield lambda: bar.advance(task)


def row_of(path: str, prediction: Prediction) -> dict[str, Any]:
    """What scripts depend on, no more and no less."""
    told = prediction.to_dict()
    return {"path": path} | {key: told[key] for key in ("label", "score", "set", "top")}


class Writer:
    """Writes answers to a file that appears whole at the end, or, if the work breaks off, with what was done.

    Raises:
        UsageError: when made, if the suffix or the place cannot be written to.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path is not None:
            check_target(path, ".csv", ".jsonl", ".parquet")
            if path.suffix == ".parquet":
                _pyarrow()

    def __enter__(self) -> Writer:
        return self

    def add(self, path: str, prediction: Prediction) -> None:
        """Take one answer."""
        if self._path is not None:
            self._rows.append(row_of(path, prediction))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from concurrent.futures import ThreadPoolExecutor

        if kind is None or self._rows:
            with ThreadPoolExecutor(1) as pool:  # no second Ctrl-C reaches a thread
                pool.submit(self.write).result()

    def write(self) -> None:
        """Write the file."""
        if self._path is None:
            return
        from cliphar.bundle import whole_file

        with whole_file(self._path) as target:
            if self._path.suffix == ".parquet":
                pyarrow, parquet = _pyarrow()
                score = [("label", pyarrow.string()), ("score", pyarrow.float64())]
                lists = [("set", pyarrow.list_(pyarrow.string())), ("top", pyarrow.list_(pyarrow.struct(score)))]
                schema = pyarrow.schema([("path", pyarrow.string()), *score, *lists])  # the same without any answer
                parquet.write_table(pyarrow.Table.from_pylist(self._rows, schema=schema), target)
            else:
                with target.open("w", encoding="utf-8", newline="") as file:
                    self._write_text(file)

    def _write_text(self, file: IO[str]) -> None:
        if self._path is not None and self._path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
            return
        table = csv.writer(file)
        table.writerow(["path", "label", "score", "set", "top"])
        for row in self._rows:
            top = "; ".join(f"{entry['label']} {entry['score']}" for entry in row["top"])
            table.writerow([row["path"], row["label"], row["score"], "; ".join(row["set"]), top])


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow; run: pip install 'cliphar[parquet]'") from error
    return pyarrow, parquet


class Commands(TyperGroup):
    """Commands that end well though nobody reads what they print."""

    def make_context(self, *args: Any, **more: Any) -> Any:  # --version prints
        with while_read():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        with while_read():
            return super().invoke(ctx)
