"""Class vectors for the known actions: a linear probe that starts from the text and is held near it.

After CLAP (Silva-Rodriguez et al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models", 2024,
https://arxiv.org/abs/2312.12730): initialised by the labels' text embeddings, with a penalty on leaving them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cliphar.training._method_recipe import HeadRecipe

__all__ = ["train_head"]


def train_head(
    features: NDArray[np.float32],
    targets: NDArray[np.int64],
    text: NDArray[np.float32],
    recipe: HeadRecipe,
    seed: int,
    pulls: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Class vectors, float32 [C,D], unit length.

    Args:
        features: float32 [N,D], unit length.
        targets: int64 [N], classes 0..C-1.
        text: float32 [C,D], unit length: where the vectors start.
        pulls: float32 [C], factors of ``recipe.pull``; None pulls all classes alike.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    start = torch.from_numpy(text)
    weights = torch.ones(len(text)) if pulls is None else torch.from_numpy(pulls)
    vectors = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([vectors], recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for _ in range(recipe.steps):
        a, b = (torch.from_numpy(random.integers(0, len(y), 1024)) for _ in range(2))
        share = float(random.beta(recipe.mixup, recipe.mixup)) if recipe.mixup else 1.0
        mixed = F.normalize(share * x[a] + (1 - share) * x[b], dim=-1)
        logits = recipe.logit_scale * mixed @ F.normalize(vectors, dim=-1).T
        smooth = recipe.label_smoothing
        loss = share * F.cross_entropy(logits, y[a], label_smoothing=smooth)
        loss = loss + (1 - share) * F.cross_entropy(logits, y[b], label_smoothing=smooth)
        loss = loss + recipe.pull * (weights * (vectors - start).pow(2).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return F.normalize(vectors.detach(), dim=-1).numpy()
