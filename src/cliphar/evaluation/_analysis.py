"""What lies behind the figures: each class, the confusion matrix, the reliability diagram, confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliphar.evaluation._metrics import Bin, Report, evaluate, reliability
from cliphar.media import ImageLike
from cliphar.recognizer import Prediction

__all__ = ["Analysis", "ClassReport", "Mistake", "analyse", "confident_mistakes"]

_RESAMPLES = 1000


@dataclass(frozen=True)
class ClassReport:
    """One label: ``n`` photos of it; precision, recall and f1 in 0..1 (0 where nothing was answered or nothing is)."""

    label: str
    n: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Mistake:
    """A photo that was answered wrongly, with the score of the wrong answer; ``image`` where ``path`` is not a file."""

    path: Path
    truth: str
    answer: str
    score: float
    image: ImageLike | None = None


@dataclass(frozen=True)
class Analysis:
    """A report with what lies behind it.

    ``ci95`` maps a figure's name to the ends of its 95 % interval: Wilson's (1927) for shares of the photos, for the
    others the percentile bootstrap over photos (Efron, 1979).
    ``confusion`` is int64 [C,C]: row i, column j counts the photos of ``labels[i]`` that were answered ``labels[j]``.
    ``reliability`` holds the bins that have photos.
    """

    labels: tuple[str, ...]
    report: Report
    ci95: dict[str, tuple[float, float]]
    classes: tuple[ClassReport, ...]
    confusion: NDArray[np.int64]
    reliability: tuple[Bin, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Analysis:
        """What :meth:`to_dict` made; other keys are left alone.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        return cls(
            labels=tuple(values["labels"]),
            report=Report(**values["figures"]),
            ci95={name: (low, high) for name, (low, high) in values["ci95"].items()},
            classes=tuple(ClassReport(**one) for one in values["classes"]),
            confusion=np.array(values["confusion"], dtype=np.int64),
            reliability=tuple(Bin(**one) for one in values["reliability"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fractions rounded to six digits."""
        return {
            "figures": self.report.to_dict(),
            "ci95": {name: list(ends) for name, ends in self.ci95.items()},
            "labels": list(self.labels),
            "classes": [_rounded(asdict(one)) for one in self.classes],
            "confusion": self.confusion.tolist(),
            "reliability": [_rounded(asdict(one)) for one in self.reliability],
        }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}


def analyse(predictions: Sequence[Prediction], truth: Sequence[str], labels: Sequence[str]) -> Analysis:
    """Everything that predictions and true labels say.

    Args:
        predictions: as :func:`evaluate` takes them.
        truth: the true label of each.
        labels: all that could be answered, in the order that the confusion matrix shall have.
    """
    report = evaluate(predictions, truth)
    number = {label: i for i, label in enumerate(labels)}
    true = np.array([number[label] for label in truth])
    best = np.array([number[prediction.top[0].label] for prediction in predictions])
    count = len(labels)
    confusion = np.bincount(true * count + best, minlength=count * count).reshape(count, count)
    hits, cases, claims = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    classes = tuple(
        ClassReport(
            label=label,
            n=int(cases[i]),
            precision=float(hits[i] / max(claims[i], 1)),
            recall=float(hits[i] / max(cases[i], 1)),
            f1=float(2 * hits[i] / max(claims[i] + cases[i], 1)),
        )
        for i, label in enumerate(labels)
    )
    return Analysis(
        labels=tuple(labels),
        report=report,
        ci95=_intervals(report, np.array([len(p.set) for p in predictions]), true, best, count),
        classes=classes,
        confusion=confusion,
        reliability=reliability(np.array([p.score for p in predictions]), true == best),
    )


def _intervals(
    report: Report,
    sizes: NDArray[np.int64],
    true: NDArray[np.int64],
    best: NDArray[np.int64],
    count: int,
) -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(0)
    n = len(true)
    drawn: dict[str, list[float]] = {"set_size": [], "macro_f1": []}
    for _ in range(_RESAMPLES):
        # how often each photo is drawn, when n photos are drawn with replacement
        times = np.bincount(random.integers(0, n, n), minlength=n).astype(np.float64)
        drawn["set_size"].append(float(sizes @ times / n))
        hits = np.bincount(true, times * (true == best), count)
        cases, claims = np.bincount(true, times, count), np.bincount(best, times, count)
        there = cases > 0
        drawn["macro_f1"].append(float((2 * hits[there] / (cases + claims)[there]).mean()))
    ends = {name: _wilson(getattr(report, name), n) for name in ("top1", "top5", "coverage")}
    ends |= {name: tuple(np.quantile(values, (0.025, 0.975))) for name, values in drawn.items()}
    return {name: (round(float(low), 6), round(float(high), 6)) for name, (low, high) in ends.items()}


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval: a bootstrap of a few photos, all answered rightly, says that none ever will be wrong."""
    z = 1.96
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return max(0.0, low), min(1.0, high)  # a digit beyond, and none right would be "-0.000" of the photos


def confident_mistakes(
    paths: Sequence[Path], predictions: Sequence[Prediction], truth: Sequence[str], count: int = 24
) -> list[Mistake]:
    """The wrong answers with the highest scores, the highest first."""
    wrong = [
        Mistake(path, label, prediction.top[0].label, prediction.score)
        for path, prediction, label in zip(paths, predictions, truth, strict=True)
        if prediction.top[0].label != label
    ]
    return sorted(wrong, key=lambda mistake: -mistake.score)[:count]
