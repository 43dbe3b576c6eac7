"""Class vectors from a few photos, in closed form.

Gaussian discriminant analysis on the image tower's embeddings, blended with the label's text vector: Wang et al.,
"A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024 (https://arxiv.org/abs/2402.04087). A
handful of photos of one action has no covariance to speak of, so mean and covariance come from a background of other
photos, measured once and kept in the bundle: Hariharan et al., "Discriminative Decorrelation for Clustering and
Classification", ECCV 2012 (https://doi.org/10.1007/978-3-642-33765-9_33).

A taught vector is compared by cosine with vectors that came from text or from training. So it is given their mean on
background photos and, as far as a vector of unit length can have it, their spread: none has an advantage, and the
bundle's calibration nearly holds for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from cliphar.bundle import Bundle
from cliphar.errors import BundleError

__all__ = ["BACKGROUND_FILE", "Background", "fit_background", "gda_vectors", "read_background"]

BACKGROUND_FILE = "background.safetensors"
_RANK = 64


@dataclass(frozen=True)
class Background:
    """Mean and covariance of the embeddings of photos of anything: ``basis.T @ diag(variances) @ basis``, and
    ``rest`` in every direction outside the basis.

    ``mean`` is float32 [D], ``basis`` float32 [K,D] with orthonormal rows, ``variances`` float32 [K].
    """

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]
    variances: NDArray[np.float32]
    rest: float

    @property
    def centre(self) -> NDArray[np.float32]:
        """The mean's direction, float32 [D]."""
        unit: NDArray[np.float32] = self.mean / np.linalg.norm(self.mean)
        return unit

    def centred(self, vectors: NDArray[np.float32], share: float) -> NDArray[np.float32]:
        """Label vectors, float32 [C,D], without a ``share`` (0..1) of their part along the mean, at unit length.

        Photos have most of their length along it, those of a small image tower more than others: a label near it is
        near all of them, a hub that takes other labels' photos. Suzuki et al., "Centering Similarity Measures to
        Reduce Hubs", EMNLP 2013 (https://aclanthology.org/D13-1058).
        """
        rest = _without(vectors, self.centre, share)
        unit: NDArray[np.float32] = (rest / np.linalg.norm(rest, axis=1, keepdims=True)).astype(np.float32)
        return unit

    def spread(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Standard deviation of the dot product with background photos: [C,D] -> float64 [C]."""
        inside = vectors @ self.basis.T
        outside = np.maximum((vectors**2).sum(1) - (inside**2).sum(1), 0)
        found: NDArray[np.float64] = np.sqrt((inside**2) @ self.variances.astype(np.float64) + self.rest * outside)
        return found

    def whiten(self, differences: NDArray[np.floating]) -> NDArray[np.float64]:
        """The covariance's inverse, with a ridge, times [C,D]."""
        dim, rank = self.basis.shape[1], len(self.basis)
        ridge = (float(self.variances.sum()) + self.rest * (dim - rank)) / (4 * rank)
        inside = differences @ self.basis.T
        outside = differences - inside @ self.basis
        found: NDArray[np.float64] = (inside / (self.variances + ridge)) @ self.basis + outside / (self.rest + ridge)
        return found

    def to_bytes(self) -> bytes:
        """The content of ``background.safetensors``; the basis in float16."""
        return save(
            {
                "mean": self.mean,
                "basis": self.basis.astype(np.float16),
                "variances": self.variances,
                "rest": np.array([self.rest], np.float32),
            }
        )


def fit_background(embeddings: NDArray[np.float32]) -> Background:
    """Statistics of image embeddings, float32 [N,D]; some hundred photos of many things, at least 2."""
    mean = embeddings.mean(0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(embeddings - mean, full_matrices=False)
    variances = singular**2 / (len(embeddings) - 1)
    dim = embeddings.shape[1]
    rank = min(_RANK, dim // 2, len(embeddings) - 1)
    rest = max(float(variances[rank:].sum()) / (dim - rank), 1e-9)
    return Background(
        mean.astype(np.float32), directions[:rank].astype(np.float32), variances[:rank].astype(np.float32), rest
    )


def read_background(bundle: Bundle) -> Background:
    """The bundle's statistics of background photos.

    Raises:
        BundleError: it has none, or they cannot be read.
    """
    if BACKGROUND_FILE not in bundle.info.files:
        raise BundleError(
            f"bundle '{bundle.info.name}' has no {BACKGROUND_FILE}, so it cannot be taught from photos; "
            "'cliphar train' writes one into every bundle it makes"
        )
    try:
        content = load_file(bundle.same_file(BACKGROUND_FILE))
        return Background(
            content["mean"], content["basis"].astype(np.float32), content["variances"], float(content["rest"][0])
        )
    except (SafetensorError, KeyError, OSError) as error:
        raise BundleError(
            f"cannot read {BACKGROUND_FILE} of bundle '{bundle.info.name}': {error}; make the bundle again"
        ) from error


def gda_vectors(
    means: NDArray[np.floating],
    counts: NDArray[np.integer],
    priors: NDArray[np.float32],
    background: Background,
    like: NDArray[np.float32] | None = None,
    *,
    text_photos: float = 4.0,
) -> NDArray[np.float32]:
    """Class vectors, float32 [C,D], unit length, from the photos' mean embeddings and what was known before.

    Args:
        means: [C,D], the mean embedding of each class's photos.
        counts: [C], how many photos each mean is of, at least 1.
        priors: float32 [C,D], unit length: the labels' text (or earlier class) vectors.
        background: of the same image tower.
        like: float32 [K,D], the vectors that these are to be compared with; each is given their mean response to
            the background and, as far as unit length allows, its spread. None: those of its own prior.
        text_photos: what a prior is worth: with as many photos, both count the same.
    """
    centre = background.centre
    compared = priors if like is None else like
    levels, spreads = compared @ centre, background.spread(_without(compared, centre))
    if like is not None:
        levels, spreads = np.full(len(priors), levels.mean()), np.full(len(priors), spreads.mean())
    seen = _without(background.whiten(means - background.mean), centre)
    told = _without(priors.astype(np.float64), centre)
    share = (counts / (counts + text_photos))[:, None]
    blend = share * seen / background.spread(seen)[:, None] + (1 - share) * told / background.spread(told)[:, None]
    blend *= (spreads / background.spread(blend))[:, None]
    rows = zip(levels, blend, told, strict=True)
    return np.stack([_unit(float(level), found, text, centre, background) for level, found, text in rows])


def _unit(
    level: float,
    blend: NDArray[np.float64],
    told: NDArray[np.float64],
    centre: NDArray[np.float32],
    background: Background,
) -> NDArray[np.float32]:
    """Unit length at the same level: too short a vector gets what background photos do not answer to, as text
    vectors have it; too long a one is shortened."""
    room = 1 - level**2
    missing = room - float(blend @ blend)
    if missing > 0:
        basis, _ = np.linalg.qr(np.concatenate([background.basis, centre[None], blend[None]]).T)
        free = told - basis @ (basis.T @ told)
        length = float(np.linalg.norm(free))
        if length > 1e-4:
            blend = blend + free * (missing**0.5 / length)
    unit: NDArray[np.float32] = (level * centre + blend * (room**0.5 / np.linalg.norm(blend))).astype(np.float32)
    return unit


def _without(vectors: NDArray[np.floating], direction: NDArray[np.float32], share: float = 1.0) -> NDArray[np.floating]:
    remaining: NDArray[np.floating] = vectors - share * (vectors @ direction)[:, None] * direction
    return remaining
