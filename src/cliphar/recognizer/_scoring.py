"""From embeddings and label vectors to predictions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Calibration
from cliphar.labels import UNKNOWN
from cliphar.recognizer._types import Prediction, Score

__all__ = ["mean_direction", "nonconformity", "probabilities", "to_predictions"]


def mean_direction(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The direction of the rows' mean: float32 [N,D] -> float32 [D], unit length."""
    mean = vectors.mean(0)
    unit: NDArray[np.float32] = (mean / np.linalg.norm(mean)).astype(np.float32)
    return unit


def probabilities(cosines: NDArray[np.float32], logit_scale: float) -> NDArray[np.float64]:
    """Softmax over labels: cosines float [N,C] -> probabilities float64 [N,C]."""
    logits = cosines.astype(np.float64) * logit_scale
    logits -= logits.max(1, keepdims=True)
    exp = np.exp(logits)
    shares: NDArray[np.float64] = exp / exp.sum(1, keepdims=True)
    return shares


def nonconformity(
    cosines: NDArray[np.float32], shares: NDArray[np.float64], margin: float | None
) -> NDArray[np.float64]:
    """How little each label conforms, float64 [N,C], of cosines and probabilities [N,C]; see ``Calibration``."""
    return 1 - shares if margin is None else margin * cosines.max(1, keepdims=True) - cosines.astype(np.float64)


def _threshold(calibration: Calibration, coverage: float) -> float:
    """The bound on nonconformity of the next fitted coverage at or above this one, in (0, 1); none above the last."""
    for fitted, threshold in calibration.conformal:
        if fitted >= coverage - 1e-9:
            return threshold
    return np.inf


def to_predictions(
    cosines: NDArray[np.float32],
    labels: tuple[str, ...],
    calibration: Calibration,
    top_k: int = 5,
    coverage: float = 0.9,
) -> list[Prediction]:
    """One prediction a row of cosines, float [N,C]."""
    bound = _threshold(calibration, coverage)
    shares = probabilities(cosines, calibration.logit_scale)
    fits = nonconformity(cosines, shares, calibration.margin) <= bound
    orders = np.argsort(-shares, axis=1, kind="stable")
    answers = []
    # as Python's own numbers: NumPy takes longer over each of them than over all of a row
    rows = zip(shares.tolist(), fits.tolist(), orders.tolist(), cosines.max(1).tolist(), strict=True)
    for row, fit, order, evidence in rows:
        best = order[0]
        answers.append(
            Prediction(
                label=UNKNOWN if evidence < calibration.unknown_below else labels[best],
                score=row[best],
                set=tuple(labels[i] for i in order if i == best or fit[i]),
                top=tuple(Score(labels[i], row[i]) for i in order[:top_k]),
                evidence=evidence,
            )
        )
    return answers
