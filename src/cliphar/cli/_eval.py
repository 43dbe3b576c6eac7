"""cliphar eval: how good a model is on a folder of labelled photos."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cliphar.cli._options import Coverage, Labels, LabelsFile, Model, Provider, Threads, chosen_labels
from cliphar.errors import DataError, MediaError, UsageError

__all__ = ["evaluate"]


def evaluate(
    data: Annotated[Path, typer.Option("--data", "-d", help="A folder of LABEL/PHOTO; _ in LABEL is a space.")],
    model: Model = None,
    labels: Labels = None,
    labels_file: LabelsFile = None,
    coverage: Coverage = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    provider: Provider = None,
    threads: Threads = None,
) -> None:
    """Measure a model on labelled photos. Without --labels the folder's own names are the choice."""
    from cliphar.data import list_labelled
    from cliphar.evaluation import evaluate as measure
    from cliphar.recognizer import Prediction, load

    listed = [(path, " ".join(label.split())) for path, label in list_labelled(data)]  # as labels are cleaned
    chosen = chosen_labels(labels, labels_file) or tuple(sorted({label for _, label in listed}))
    stray = sorted({label for _, label in listed} - set(chosen))
    if stray:
        raise UsageError(f"{data} has folders that are not among the labels: {', '.join(stray[:5])}; add or move them")
    recognizer = load(model, provider=provider, threads=threads)
    top_k = max(5, len(recognizer.labels))
    if listed:  # the first call pays for allocations that the rate should not
        list(recognizer.stream([listed[0][0]], chosen))
    predictions: list[Prediction] = []
    truth: list[str] = []
    started = time.perf_counter()
    for (_, label), answer in zip(
        listed, recognizer.stream((p for p, _ in listed), chosen, top_k=top_k, coverage=coverage), strict=True
    ):
        if isinstance(answer, MediaError):
            print(f"cliphar: {answer}", file=sys.stderr)
        else:
            predictions.append(answer)
            truth.append(label)
    rate = len(predictions) / (time.perf_counter() - started)
    if not predictions:
        raise DataError(f"none of the {len(listed)} photos in {data} could be read")
    report = measure(predictions, truth).to_dict() | {"images_per_s": round(rate, 1)}
    if as_json:
        print(json.dumps(report))
    else:
        width = max(map(len, report))
        for key, value in report.items():
            print(f"{key:<{width}}  {value}")
    if len(predictions) < len(listed):
        raise typer.Exit(1)
