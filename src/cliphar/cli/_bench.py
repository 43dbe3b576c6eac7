"""cliphar bench: how fast each runtime of a model is here."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliphar.cli._options import a_path
from cliphar.cli._output import check_target, say, tell, while_read
from cliphar.errors import UsageError

if TYPE_CHECKING:
    from cliphar.bench import Bench

__all__ = ["bench"]

_COLUMNS = ("runtime", "threads", "batch", "images/s", "p50 ms", "p95", "p99", "x pytorch", "of peak", "from JPEG")
_KEY = (0, 1, 2)
_MORE = ("load s", "memory MiB", "file MiB", "accuracy")


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or max(numbers) > 256:
        raise UsageError(f"{option} {text!r} is not numbers from 1 to 256 with commas, as in 1,8")
    return numbers


def bench(
    model: Annotated[str, typer.Argument(help="A model's name or a bundle's directory.")] = "mini",
    runtime: Annotated[
        str | None, typer.Option(help="Runtimes, comma-separated.", show_default="all of the bundle, and pytorch")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8",
    threads: Annotated[
        str | None, typer.Option(help="CPU threads, comma-separated.", show_default="as many as allowed")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds to measure each runtime and batch size.")] = 2.0,
    data: Annotated[
        Path | None,
        typer.Option(parser=a_path, metavar="<path>", help="Photos as LABEL/PHOTO, to measure accuracy too."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of speed and accuracy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the runtimes on this machine. Measures speed, memory and accuracy, in turns, beside plain PyTorch."""
    from cliphar.bench import plot_bench, run_bench
    from cliphar.bundle import find_bundle

    if plot is not None:
        check_target(plot, ".pdf", ".png", ".svg")
        if find_spec("matplotlib") is None:  # before minutes of measuring
            raise UsageError("a plot needs matplotlib; run: pip install 'cliphar[train]'")
    try:
        result = run_bench(
            find_bundle(model),
            runtimes=[name.strip() for name in runtime.split(",")] if runtime else (),
            batches=_numbers(batch, "--batch"),
            threads=_numbers(threads, "--threads") if threads else (),
            seconds=seconds,
            data=data,
            say=say,
        )
    except ImportError as error:
        raise UsageError(
            "to measure PyTorch or accuracy too needs torch and onnx; run: pip install 'cliphar[train]', "
            "or name runtimes with --runtime onnx"
        ) from error
    for reason in result.skipped.values():
        tell(reason)
    with while_read(go_on=plot is not None):
        if as_json:
            print(json.dumps(result.to_dict()))
        else:
            _show(result)
    if plot is not None:
        plot_bench(result, plot)


def _show(result: Bench) -> None:
    if result.gflop is not None:
        peaks = ", ".join(f"{peak:g} GFLOP/s with {count} threads" for count, peak in result.peak_gflops.items())
        print(f"{result.model}: {result.gflop:g} GFLOP a photo; matrix products at {peaks or 'an unknown peak'}")
    rows = [(*_COLUMNS, *_MORE)] + [
        (
            row.runtime,
            str(row.threads),
            str(row.batch),
            f"{row.images_per_s:.1f}",
            f"{row.p50_ms:.1f}",
            f"{row.p95_ms:.1f}",
            f"{row.p99_ms:.1f}",
            "" if row.speedup is None else f"{row.speedup:.2f}",
            "" if row.peak_share is None else f"{row.peak_share:.0%}",
            f"{row.bytes_images_per_s:.1f}",
            f"{row.load_s:.2f}",
            f"{row.memory_mib:.0f}",
            f"{row.file_mib:.1f}",
            "" if row.accuracy is None else f"{row.accuracy:.3f}",
        )
        for row in result.rows
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    for columns in _blocks(widths, room):
        for line in rows:
            cells = [line[column].rjust(widths[column]) for column in columns]
            print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())


def _blocks(widths: list[int], room: int) -> list[list[int]]:
    """The columns, divided into tables that fit the terminal; each begins with those that name its rows."""
    blocks = [[*_KEY]]
    for column in range(len(_KEY), len(widths)):
        if sum(widths[one] + 2 for one in [*blocks[-1], column]) - 2 > room and len(blocks[-1]) > len(_KEY):
            blocks.append([*_KEY])
        blocks[-1].append(column)
    return blocks
