"""Gaussian discriminant analysis on the starting model's embeddings, in closed form, blended with the text.

Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024
(https://arxiv.org/abs/2402.04087). The same formulas teach a recogniser: see ``cliphar.recognizer``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cliphar.recognizer import BACKGROUND_FILE, fit_background, gda_vectors, read_background
from cliphar.training._job import TRAIN, Job, Outcome
from cliphar.training._method_recipe import GdaRecipe

__all__ = ["gda"]

_ENOUGH = 1000  # photos whose own covariance is better than a background's


def gda(job: Job) -> Outcome:
    """Class vectors from the mean of each label's photos."""
    features, targets = job.features(TRAIN), job.targets[job.rows(TRAIN)]
    present, own = np.unique(targets, return_inverse=True)
    means = np.stack([features[targets == c].mean(0) for c in present])
    if len(features) >= _ENOUGH:
        background = fit_background(features - means[own])  # within labels: what tells them apart is no noise
    elif BACKGROUND_FILE in job.bundle.info.files:
        background = read_background(job.bundle)
    else:
        background = fit_background(features)
    background = replace(background, mean=means.mean(0).astype(np.float32))  # these labels are told from each other
    vectors = job.text_vectors()  # what a label without a photo keeps
    vectors[present] = gda_vectors(
        means,
        np.array([(targets == c).sum() for c in present]),
        vectors[present],
        background,
        like=vectors,
        text_photos=job.recipe_as(GdaRecipe).gda.text_photos,
    )
    return Outcome(vectors)
