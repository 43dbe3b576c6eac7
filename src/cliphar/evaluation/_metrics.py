"""Metrics of predictions against true labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cliphar.labels import UNKNOWN
from cliphar.recognizer import Prediction

__all__ = ["FIGURES", "Bin", "Report", "evaluate", "expected_calibration_error", "macro_f1", "reliability"]

# what a report's figures are called for people
FIGURES = {
    "n": "photos",
    "top1": "top-1",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "ece": "calibration error",
    "coverage": "coverage of sets",
    "set_size": "labels in a set",
    "unknown": "answered unknown",
}


@dataclass(frozen=True)
class Bin:
    """The photos whose best score lies in ``low``..``high``: how many, their mean score, the share answered right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """All but ``n`` and ``set_size`` are fractions in 0..1; ``top1`` ranks labels and does not count ``unknown``.

    ``ece`` is the expected calibration error over 15 bins, ``coverage`` how often the prediction set held the truth,
    ``set_size`` its mean size, ``unknown`` how often the answer was ``unknown``.
    """

    n: int
    top1: float
    top5: float
    macro_f1: float
    ece: float
    coverage: float
    set_size: float
    unknown: float

    def to_dict(self) -> dict[str, float | int]:
        """Plain values, rounded to six digits."""
        return {key: value if isinstance(value, int) else round(value, 6) for key, value in asdict(self).items()}


def reliability(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = 15) -> tuple[Bin, ...]:
    """The non-empty of ``bins`` equal-width bins of ``confidence`` (float [N] in 0..1), in ascending order."""
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    found = []
    for b in np.unique(bin_of):
        inside = bin_of == b
        share, right = float(confidence[inside].mean()), float(correct[inside].mean())
        found.append(Bin(float(b / bins), float((b + 1) / bins), int(inside.sum()), share, right))
    return tuple(found)


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over equal-width bins, weighted by their photos (Guo et al., 2017)."""
    found = reliability(confidence, correct, bins)
    return sum(one.n * abs(one.confidence - one.accuracy) for one in found) / len(confidence)


def macro_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in ``truth``."""
    hits = Counter(t for t, p in zip(truth, predicted, strict=True) if t == p)
    cases, claims = Counter(truth), Counter(predicted)
    return float(np.mean([2 * hits[label] / (cases[label] + claims[label]) for label in sorted(cases)]))


def evaluate(predictions: Sequence[Prediction], truth: Sequence[str]) -> Report:
    """Compare predictions, whose ``top`` holds at least five labels where there are as many, with the true labels."""
    if not predictions or len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions for {len(truth)} labels")
    best = [prediction.top[0].label for prediction in predictions]
    correct = np.array([b == t for b, t in zip(best, truth, strict=True)])
    return Report(
        n=len(truth),
        top1=float(correct.mean()),
        top5=float(np.mean([t in [s.label for s in p.top[:5]] for p, t in zip(predictions, truth, strict=True)])),
        macro_f1=macro_f1(truth, best),
        ece=expected_calibration_error(np.array([p.score for p in predictions]), correct),
        coverage=float(np.mean([t in p.set for p, t in zip(predictions, truth, strict=True)])),
        set_size=float(np.mean([len(p.set) for p in predictions])),
        unknown=float(np.mean([p.label == UNKNOWN for p in predictions])),
    )
