"""Speed and accuracy, as a picture."""

from __future__ import annotations

from pathlib import Path

from cliphar.bench._bench import Bench, Row
from cliphar.errors import UsageError

__all__ = ["plot_bench"]


def plot_bench(bench: Bench, target: Path) -> None:
    """Write one bar a runtime: its photos a second, at the batch and threads where it is fastest, and its accuracy.

    Raises:
        UsageError: the file's suffix is of no picture, or it cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    best: dict[str, Row] = {}
    for row in bench.rows:
        if row.runtime not in best or row.images_per_s > best[row.runtime].images_per_s:
            best[row.runtime] = row
    rows = sorted(best.values(), key=lambda row: row.images_per_s)
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.35 * len(rows)), layout="constrained")
    bars = axes.barh([row.runtime for row in rows], [row.images_per_s for row in rows])
    accuracies = ["" if row.accuracy is None else f", top-1 {row.accuracy:.3f}" for row in rows]
    labels = [f"{row.images_per_s:.0f}{accuracy}" for row, accuracy in zip(rows, accuracies, strict=True)]
    axes.bar_label(bars, labels, padding=4)
    axes.margins(x=0.3)  # for what is written beside the longest
    axes.set_xlabel("photos a second, at the batch and threads where each is fastest")
    axes.set_title(bench.model)
    try:
        figure.savefig(target, dpi=110)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot write {target}: {error}; give a .png or .svg") from error
    finally:
        pyplot.close(figure)
