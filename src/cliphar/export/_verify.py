"""The proof that an exported runtime answers as the reference does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import ClipharError
from cliphar.evaluation import paired_interval
from cliphar.runtime import Runtime

__all__ = ["TOLERANCES", "RefusedError", "embed", "head_of", "measure", "refusal"]


class RefusedError(ClipharError):
    """An export answers too differently from the reference, by ``parity``; nothing was added to the bundle."""

    parity: dict[str, float]


# precision -> the least mean cosine and the least top-1 agreement with the reference
TOLERANCES = {
    "fp32": (0.99999, 0.995),
    "fp16": (0.9999, 0.98),
    "bf16": (0.999, 0.95),
    "w8": (0.999, 0.95),
    "int8": (0.98, 0.95),
}


def embed(runtime: Runtime, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [N,D], in batches of 8."""
    return np.concatenate([runtime.encode_images(images[at : at + 8]) for at in range(0, len(images), 8)])


def head_of(bundle: Bundle) -> NDArray[np.float32]:
    """Vectors to compare top-1 answers by, float32 [C,D]: the labels' or, of a bundle without, random directions."""
    if bundle.info.labels:
        return bundle.class_vectors()
    random = np.random.default_rng(0).normal(size=(15, bundle.info.embedding_dim)).astype(np.float32)
    unit: NDArray[np.float32] = random / np.linalg.norm(random, axis=1, keepdims=True)
    return unit


def measure(
    reference: NDArray[np.float32],
    answers: NDArray[np.float32],
    head: NDArray[np.float32],
    truth: NDArray[np.int64] | None,
) -> dict[str, float]:
    """What bundle.json keeps as parity.

    ``cosine_mean`` and ``cosine_min`` of the embeddings, ``max_difference`` of their components, ``agreement`` of
    top-1 answers; with ``truth`` also ``accuracy``, ``accuracy_reference`` and their difference with its 95 %
    interval (:func:`~cliphar.evaluation.paired_interval`).
    """
    cosines = (reference * answers).sum(1)
    theirs, ours = (reference @ head.T).argmax(1), (answers @ head.T).argmax(1)
    values = {
        "photos": float(len(answers)),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "max_difference": float(np.abs(reference - answers).max()),
        "agreement": float((theirs == ours).mean()),
    }
    if truth is not None:
        change = (ours == truth).astype(np.int64) - (theirs == truth)
        low, high = paired_interval(int((change > 0).sum()), int((change < 0).sum()), len(change))
        values |= {
            "accuracy": float((ours == truth).mean()),
            "accuracy_reference": float((theirs == truth).mean()),
            "accuracy_difference": float(change.mean()),
            "difference_low": low,
            "difference_high": high,
        }
    return {key: round(value, 6) for key, value in values.items()}


def refusal(parity: dict[str, float], precision: str, max_loss: float) -> str | None:
    """Why this parity is outside the tolerance of its precision, or None."""
    cosine, agreement = TOLERANCES[precision]
    photos, agreed = parity["photos"], parity["agreement"]
    if not parity["cosine_mean"] >= cosine:  # not "<": the mean of what is not finite is neither
        return f"mean cosine {parity['cosine_mean']:.5f} is under {cosine:g}"
    if agreed + 1.96 * np.sqrt(agreed * (1 - agreed) / photos) < agreement:  # few photos prove little against it
        return f"top-1 agreement {agreed:.3f} is under {agreement:g}"
    if -parity.get("accuracy_difference", 0.0) > max(max_loss, 1.5 / photos):
        return f"accuracy falls by {-parity['accuracy_difference']:.4f}, more than {max_loss:g}"
    return None
