"""From embeddings and label vectors to predictions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Calibration
from cliphar.labels import UNKNOWN
from cliphar.recognizer._types import Prediction, Score

__all__ = ["mean_direction", "probabilities", "to_predictions"]


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


def _threshold(calibration: Calibration, coverage: float) -> float:
    """The bound on 1 - p(label) of the next fitted coverage at or above this one, in (0, 1); 1 above the last."""
    for fitted, threshold in calibration.conformal:
        if fitted >= coverage - 1e-9:
            return threshold
    return 1.0


def to_predictions(
    cosines: NDArray[np.float32],
    labels: tuple[str, ...],
    calibration: Calibration,
    top_k: int = 5,
    coverage: float = 0.9,
) -> list[Prediction]:
    """One prediction a row of cosines, float [N,C]."""
    bound = _threshold(calibration, coverage)
    answers = []
    for row, evidence in zip(probabilities(cosines, calibration.logit_scale), cosines.max(1), strict=True):
        order = np.argsort(-row, kind="stable")
        members = [i for rank, i in enumerate(order) if rank == 0 or 1 - row[i] <= bound]
        best = int(order[0])
        answers.append(
            Prediction(
                label=UNKNOWN if evidence < calibration.unknown_below else labels[best],
                score=float(row[best]),
                set=tuple(labels[i] for i in members),
                top=tuple(Score(labels[i], float(row[i])) for i in order[:top_k]),
                evidence=float(evidence),
            )
        )
    return answers
