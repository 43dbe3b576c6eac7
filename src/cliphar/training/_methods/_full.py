"""All weights, by labels and the contrastive loss of pre-training, then mixed with those that training started from.

Goyal et al., "Finetune like you pretrain", CVPR 2023 (https://arxiv.org/abs/2212.00638): FLYP. Wortsman et al., "Robust
fine-tuning of zero-shot models", CVPR 2022 (https://arxiv.org/abs/2109.01903): WiSE-FT; the share of the trained
weights is the one that is best on the validation part. Of clips, the frames' embeddings are averaged: Rasheed et al.,
"Fine-tuned CLIP Models are Efficient Video Learners", CVPR 2023 (https://arxiv.org/abs/2212.03640): ViFi-CLIP.
"""

from __future__ import annotations

from cliphar.training._gradient import train_towers
from cliphar.training._job import Job, Outcome
from cliphar.training._method_recipe import WiseRecipe

__all__ = ["full"]


def full(job: Job) -> Outcome:
    """Towers and class vectors, from photos or clips."""
    recipe = job.recipe_as(WiseRecipe)
    return train_towers(job, recipe, shares=recipe.wise.shares)
