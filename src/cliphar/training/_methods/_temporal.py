"""Clips: the frames' embeddings are averaged, and all weights trained on that.

Rasheed et al., "Fine-tuned CLIP Models are Efficient Video Learners", CVPR 2023 (https://arxiv.org/abs/2212.03640):
ViFi-CLIP.
"""

from __future__ import annotations

from cliphar.training._gradient import train_towers
from cliphar.training._job import Job, Outcome
from cliphar.training._method_recipe import TemporalRecipe

__all__ = ["temporal"]


def temporal(job: Job) -> Outcome:
    """Towers and class vectors, from clips."""
    recipe = job.recipe_as(TemporalRecipe)
    return train_towers(job, recipe, shares=recipe.wise.shares)
