"""Two models on the same photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cliphar.recognizer import Prediction

__all__ = ["Comparison", "compare", "harmonic_mean", "mcnemar", "paired_interval"]


@dataclass(frozen=True)
class Comparison:
    """A model against another one, ``other``, photo by photo.

    ``difference`` is this top-1 less the other's, -1..1, and ``difference_ci95`` the ends of its 95 % interval
    (:func:`paired_interval`). ``only_this`` and ``only_other`` count the photos that just one of them got right;
    ``p_value`` is how likely counts as uneven as these are if neither is better.
    """

    other: str
    other_top1: float
    difference: float
    difference_ci95: tuple[float, float]
    only_this: int
    only_other: int
    p_value: float

    def to_dict(self) -> dict[str, str | int | float | list[float]]:
        """Plain values; fractions to six digits, the p-value to six significant ones."""
        values = asdict(self)
        return values | {
            "other_top1": round(self.other_top1, 6),
            "difference": round(self.difference, 6),
            "difference_ci95": [round(end, 6) for end in self.difference_ci95],
            "p_value": float(f"{self.p_value:.6g}"),
        }


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of so many heads and tails if the coin is fair: that neither of two models is better.

    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947, in its exact form.
    """
    tosses = only_first + only_second
    tail = ways = 1  # to toss k heads, each from the one before: anew it takes minutes for thousands of tosses
    for k in range(min(only_first, only_second)):
        ways = ways * (tosses - k) // (k + 1)
        tail += ways
    return float(min(1.0, 2 * tail / 2**tosses))


def paired_interval(only_first: int, only_second: int, photos: int) -> tuple[float, float]:
    """The ends, -1..1, of the 95 % interval of the difference of two accuracies on the same ``photos``.

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data",
    2012: one more photo is counted for either. Of few photos that both get right it is wide, where resampling them, or
    the normal approximation, says that the two are the same for certain.
    """
    gain, loss = ((count + 1) / (photos + 2) for count in (only_first, only_second))
    half = 1.96 * ((gain + loss - (gain - loss) ** 2) / (photos + 2)) ** 0.5
    return max(-1.0, gain - loss - half), min(1.0, gain - loss + half)


def compare(this: Sequence[Prediction], other: Sequence[Prediction], truth: Sequence[str], name: str) -> Comparison:
    """Compare the answers of two models to the same photos; ``name`` is the other's."""
    ours, theirs = (
        np.array([p.top[0].label == t for p, t in zip(answers, truth, strict=True)]) for answers in (this, other)
    )
    gain: NDArray[np.int64] = ours.astype(np.int64) - theirs
    only_this, only_other = int((gain > 0).sum()), int((gain < 0).sum())
    return Comparison(
        other=name,
        other_top1=float(theirs.mean()),
        difference=float(gain.mean()),
        difference_ci95=paired_interval(only_this, only_other, len(gain)),
        only_this=only_this,
        only_other=only_other,
        p_value=mcnemar(only_this, only_other),
    )


def harmonic_mean(base: float, novel: float) -> float:
    """Of the accuracies on trained and on new classes; low when either is (Xian et al., 2017; Zhou et al., 2022)."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
