"""Fit a bundle's calibration on photos that training never saw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Calibration
from cliphar.recognizer import nonconformity, probabilities

__all__ = ["OPEN_MARGIN", "fit_calibration"]

OPEN_MARGIN = 0.75  # of lists of any words: a softmax over few labels made sets of too many, over many of too few

_COVERAGES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
_FEWEST = 20


def fit_calibration(
    cosines: NDArray[np.float32], truth: NDArray[np.int64], refused: float = 0.02, margin: float | None = None
) -> Calibration:
    """Temperature, conformal thresholds and the bound for ``unknown``.

    The temperature minimises the negative log likelihood (Guo et al., 2017) with 1/(n+2) of each of the n photos
    counted as answered otherwise (Platt, 1999): of few photos, all answered rightly, the likeliest scores would all be
    1. The conformal threshold of a coverage c is the ceil((n+1)c)/n quantile of the true labels' nonconformity. The
    bound for ``unknown`` is the cosine under which ``refused`` of the correctly answered photos lie, so that few right
    answers are withheld; of fewer than 20 even the lowest would withhold more than one in 20 to come, and nothing is.

    Args:
        cosines: float [N,C] of calibration photos and labels.
        truth: int64 [N].
        refused: the fraction of right answers that may become ``unknown``.
        margin: of the nonconformity, 0..1; None takes 1 - p(label).
    """
    rows = np.arange(len(truth))
    scales = np.geomspace(2, 400, 240)
    doubt = 1 / (len(truth) + 2)
    losses = []
    for scale in map(float, scales):
        share = probabilities(cosines, scale)[rows, truth]
        losses.append(-((1 - doubt) * np.log(share + 1e-12) + doubt * np.log(1 - share + 1e-12)).mean())
    scale = float(scales[int(np.argmin(losses))])
    misfit = np.sort(nonconformity(cosines, probabilities(cosines, scale), margin)[rows, truth])
    most = 1.0 if margin is None else 1.0 + margin
    conformal = []
    for coverage in _COVERAGES:
        rank = int(np.ceil((len(misfit) + 1) * coverage))
        conformal.append((coverage, float(misfit[rank - 1]) if rank <= len(misfit) else most))
    right = cosines.argmax(1) == truth
    evidence = cosines.max(1)[right]
    bound = float(np.quantile(evidence, refused)) if len(evidence) >= _FEWEST else -1.0
    return Calibration(
        logit_scale=scale,
        margin=margin,
        conformal=tuple(conformal),
        unknown_below=bound,
        photos=len(truth),
    )
