"""cliphar predict: photos in, actions out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

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
from cliphar.errors import MediaError, UsageError, printable

__all__ = ["predict"]


def predict(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of photos, or patterns such as 'trip/*.jpg'.")],
    labels: Labels = None,
    labels_file: LabelsFile = None,
    model: Model = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="How many labels to show.")] = 5,
    coverage: Coverage = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write all answers to a .csv, .jsonl or .parquet file.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on a Ray cluster; photos may be in .tar shards, --out is a folder.")
    ] = False,
    runtime: Runtime = None,
    provider: Provider = None,
    threads: Threads = None,
) -> None:
    """Recognise what people are doing in photos."""
    from cliphar.cli._output import Writer, named_error, progress, row_of, show, tell, while_read
    from cliphar.recognizer import load

    chosen = chosen_labels(labels, labels_file)
    files = _photos(paths)
    if ray:
        from cliphar.cli._ray import predict_on_ray

        if out is None or out.suffix or as_json:
            raise UsageError("--ray writes Parquet files: give --out FOLDER, and no --json")
        engine = (runtime, provider)
        predict_on_ray(files, out, model=model, engine=engine, labels=chosen, top_k=top_k, coverage=coverage)
        return
    with Writer(out) as writer:
        recognizer = load(model, runtime=runtime, provider=provider, threads=threads)
        failed = 0
        answers = recognizer.stream(files, chosen, top_k=top_k, coverage=coverage)
        with progress(len(files), quiet=as_json or sys.stdout.isatty()) as advance:
            for path, answer in zip(files, answers, strict=True):
                advance()
                shown = printable(path)
                if isinstance(answer, MediaError):
                    failed += 1
                    tell(named_error(shown, answer))
                    continue
                writer.add(shown, answer)
                with while_read(go_on=out is not None):
                    if as_json:
                        print(json.dumps(row_of(shown, answer), ensure_ascii=False), flush=True)
                    else:
                        show(shown, answer)
    if failed:
        raise typer.Exit(1)


def _photos(paths: list[str]) -> list[str]:
    """What ``expand`` finds. Of clips among them, as in a camera's folder, it is said that they are not looked at."""
    from cliphar.cli._output import tell
    from cliphar.media import is_clip_name, is_image_name

    files: list[str] = []
    for given in paths:
        clips: list[str] = []

        def wanted(name: str, clips: list[str] = clips) -> bool:
            if is_clip_name(name):
                clips.append(name)
            return is_image_name(name)

        try:
            files += expand([given], wanted)
        finally:  # also where there is nothing else
            if clips:
                tell(f"{given} holds videos ({len(clips)}); run 'cliphar video' on it")
    return files
