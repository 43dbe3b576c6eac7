"""cliphar video: a video in, a timeline of actions out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliphar.cli._options import (
    Coverage,
    Labels,
    LabelsFile,
    Model,
    Provider,
    Runtime,
    Threads,
    chosen_labels,
    expand,
)
from cliphar.cli._output import check_target, named_error, tell, while_read
from cliphar.errors import MediaError, UsageError, one_line, printable

if TYPE_CHECKING:
    from cliphar.recognizer import Recognizer
    from cliphar.timeline import Timeline

__all__ = ["video"]

_WIDTH = 60


def video(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Videos, folders of videos, or patterns such as 'cam/*.mp4'; or one camera to watch until Ctrl-C: "
            "rtsp://..., http://..., /dev/video0 or camera:0."
        ),
    ],
    labels: Labels = None,
    labels_file: LabelsFile = None,
    model: Model = None,
    coverage: Coverage = 0.9,
    multi_label: Annotated[bool, typer.Option("--multi-label", help="Several actions may happen at once.")] = False,
    fps: Annotated[float | None, typer.Option(help="Frames to look at per second.", show_default="the model's")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per video, or per change on a camera.")
    ] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            "-o",
            help="Also write .csv, .jsonl, .vtt (subtitles), .mp4 (annotated) or .png (contact sheet), for one video; "
            "may be given several times.",
        ),
    ] = None,
    runtime: Runtime = None,
    provider: Provider = None,
    threads: Threads = None,
) -> None:
    """Recognise what happens when in videos, or now on a camera."""
    from cliphar.media import is_camera, is_video_name
    from cliphar.recognizer import load

    chosen = chosen_labels(labels, labels_file)
    if any(is_camera(path) for path in paths):
        if len(paths) > 1 or out or multi_label:
            raise UsageError("a camera is watched alone, without --out or --multi-label; --json keeps its segments")
        from cliphar.cli._camera import watch

        recognizer = load(model, runtime=runtime, provider=provider, threads=threads)
        watch(recognizer, paths[0], chosen, coverage, fps, as_json)
        return
    files = list(expand(paths, is_video_name, "videos"))
    targets = list(out or ())
    _check(targets, files)
    recognizer = load(model, runtime=runtime, provider=provider, threads=threads)
    failed = False
    for path in files:
        shown = printable(path)
        try:
            timeline = _read(recognizer, path, chosen, coverage, multi_label, fps)
        except MediaError as error:
            failed = True
            tell(named_error(shown, error))
            continue
        if timeline.warning:
            failed = True
            tell(f"{shown}: {timeline.warning}")
        with while_read(go_on=bool(targets)):
            if as_json:
                print(json.dumps({"path": shown} | timeline.to_dict(), ensure_ascii=False), flush=True)
            else:
                _show(one_line(shown), timeline)
        for target in targets:
            _write(target, path, timeline)
    if failed:
        raise typer.Exit(1)


def _read(
    recognizer: Recognizer,
    path: str,
    labels: tuple[str, ...] | None,
    coverage: float,
    multi_label: bool,
    fps: float | None,
) -> Timeline:
    from cliphar.timeline import Progress, Timeline, stream_video

    items = stream_video(recognizer, path, labels, coverage=coverage, multi_label=multi_label, fps=fps)
    with _progress(path) as advance:
        for item in items:
            if isinstance(item, Timeline):
                return item
            if isinstance(item, Progress):
                advance(item.time_s, item.duration_s)
    raise AssertionError("a stream ends with its timeline")


@contextmanager
def _progress(path: str) -> Iterator[Callable[[float, float | None], None]]:
    if not sys.stderr.isatty():
        yield lambda _time_s, _duration_s: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed:.0f} s"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(one_line(path), total=None)
        yield lambda time_s, duration_s: bar.update(task, completed=time_s, total=duration_s)


def _show(path: str, timeline: Timeline) -> None:
    """A coloured bar and a table on a terminal; in a pipe, a tab-separated line a segment."""
    if not sys.stdout.isatty():
        for one in timeline.segments:
            print(f"{path}\t{one.start_s:.3f}\t{one.end_s:.3f}\t{one.label}\t{one.score:.4f}", flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    from cliphar.labels import with_score

    console = Console(highlight=False)
    console.print(Text(f"{path}  {timeline.duration_s:.1f} s", style="bold"))
    names = sorted({one.label for one in timeline.segments} - {"unknown"})
    palette = ("green", "cyan", "magenta", "yellow", "blue", "red")
    colours = {name: palette[at % len(palette)] for at, name in enumerate(names)} | {"unknown": "bright_black"}
    bar = Text("  ")
    width = max(1, min(_WIDTH, console.width - 3))
    for at in range(width):
        time_s = (at + 0.5) / width * timeline.duration_s
        now = next((one for one in timeline.segments if one.start_s <= time_s < one.end_s), None)
        bar.append("█" if now else " ", style=colours[now.label] if now else "")
    console.print(bar if timeline.segments else Text("  nothing fits", style="dim"))
    for one in timeline.segments:
        line = Text(f"  {one.start_s:8.1f} {one.end_s:8.1f} s  ")
        line.append(with_score(one.label, one.score), style=colours[one.label])
        console.print(line)


def _check(targets: list[Path], files: list[str]) -> None:
    if targets and len(files) > 1:
        raise UsageError(
            f"--out is for one video, and there are {len(files)}; run them one by one, or print into a file: > out.tsv"
        )
    for target in targets:
        check_target(target, ".csv", ".jsonl", ".mp4", ".png", ".vtt")
        if target.exists() and Path(files[0]).exists() and target.samefile(files[0]):
            raise UsageError(f"cannot write {target}: it is the video itself; give another name")
        if target.suffix in (".mp4", ".png") and Path(files[0]).is_fifo():
            raise UsageError(f"cannot write {target}: a pipe gives its pictures once; save the video to a file first")


def _write(target: Path, path: str, timeline: Timeline) -> None:
    from cliphar.bundle import whole_file
    from cliphar.timeline import annotate, contact_sheet, to_csv, to_webvtt

    if target.suffix == ".mp4":
        annotate(path, timeline.segments, target)
        return
    with whole_file(target) as part:
        match target.suffix:
            case ".png":
                contact_sheet(path, timeline.segments).save(part)
            case ".csv":
                part.write_text(to_csv(timeline.segments), encoding="utf-8")
            case ".vtt":
                part.write_text(to_webvtt(timeline.segments), encoding="utf-8")
            case _:
                rows = [json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in timeline.segments]
                part.write_text("".join(rows), encoding="utf-8")
