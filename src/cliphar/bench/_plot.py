"""Accuracy against speed, as a picture."""

from __future__ import annotations

from pathlib import Path

from cliphar.bench._bench import Bench, Row
from cliphar.errors import UsageError

__all__ = ["plot_bench"]


def plot_bench(bench: Bench, target: Path) -> None:
    """Write one mark a runtime, at the batch and threads where it is fastest: accuracy over photos a second.

    Without accuracies the marks become bars of speed.

    Raises:
        UsageError: matplotlib is not installed, or the file's suffix is of no picture.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("a plot needs matplotlib; run: pip install 'cliphar[train]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    best: dict[str, Row] = {}
    for row in bench.rows:
        if row.runtime not in best or row.images_per_s > best[row.runtime].images_per_s:
            best[row.runtime] = row
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    points = [(row.runtime, row.images_per_s, row.accuracy) for row in best.values() if row.accuracy is not None]
    if points:
        for name, speed, accuracy in points:
            axes.plot(speed, accuracy, "o")
            axes.annotate(name, (speed, accuracy), xytext=(5, 5), textcoords="offset points")
        axes.set_ylabel("top-1 accuracy")
        axes.margins(0.15)
    else:
        axes.barh(list(best), [row.images_per_s for row in best.values()])
    axes.set_xlabel("photos a second")
    axes.set_title(bench.model)
    try:
        figure.savefig(target, dpi=110)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot write {target}: {error}; give a .png or .svg") from error
    finally:
        pyplot.close(figure)
