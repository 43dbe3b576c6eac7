"""Low-rank changes of the towers' weights, merged into them at the end.

Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", 2024
(https://arxiv.org/abs/2405.18541): CLIP-LoRA, which adapts query, key and value of every layer of both towers with
rank 2. In a convolutional tower, which has none, the 1x1 convolutions and the projection are adapted: they are
matrices too.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cliphar.errors import UsageError
from cliphar.training._gradient import train_towers
from cliphar.training._job import Job, Outcome
from cliphar.training._method_recipe import LoraRecipe, LoraSection

__all__ = ["adapt", "lora", "merge"]

_ATTENTION = ("*.attn.in_proj_weight", "*.qkv.weight", "*.[qkv]_proj.weight")
_CONVOLUTIONAL = (
    *("*._expand_conv.weight", "*._project_conv.weight", "*.project.weight"),
    *("*.mlp.fc[12].weight", "*.head.proj.weight"),  # ConvNeXt's
)


class _LowRank(nn.Module):
    """``weight + alpha / rank * up @ down``, for each of ``blocks`` blocks of rows (query, key and value)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, blocks: int) -> None:
        super().__init__()
        rows, columns = weight.shape[0] // blocks, weight[0].numel()
        self.down = nn.Parameter(torch.randn(blocks, rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(blocks, rows, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        change = (self.up @ self.down).flatten(0, 1).view_as(weight)
        return weight + self.scale * change


def adapt(towers: nn.Module, section: LoraSection) -> int:
    """Freeze all weights and give those chosen a low-rank change; how many were.

    Raises:
        UsageError: no weight has such a name.
    """
    names = [name for name, parameter in towers.named_parameters() if parameter.ndim >= 2]

    def fitting(patterns: Sequence[str], within: str = "") -> list[str]:
        return [n for n in names if n.startswith(within) and any(fnmatchcase(n, pattern) for pattern in patterns)]

    chosen = fitting(section.targets)
    if not section.targets:
        for tower, _ in towers.named_children():
            chosen += fitting(_ATTENTION, tower) or fitting(_CONVOLUTIONAL, tower)
    if not chosen:
        raise UsageError(
            f"lora.targets {', '.join(section.targets) or '()'} fit no weight; there are {', '.join(names[:3])}, ..."
        )
    towers.requires_grad_(False)
    for name in chosen:
        parent, _, own = name.rpartition(".")
        module = towers.get_submodule(parent)
        blocks = 3 if own == "in_proj_weight" or parent.endswith("qkv") else 1
        weight = getattr(module, own)
        parametrize.register_parametrization(module, own, _LowRank(weight, section.rank, section.alpha, blocks))
    return len(chosen)


def merge(towers: nn.Module) -> None:
    """Make the changes part of the weights."""
    for module in list(towers.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def lora(job: Job) -> Outcome:
    """Towers by low-rank changes, and class vectors."""
    recipe = job.recipe_as(LoraRecipe)

    def prepare(towers: nn.Module) -> None:
        torch.manual_seed(recipe.seed)
        count = adapt(towers, recipe.lora)
        job.around.log(f"{count} weights adapted with rank {recipe.lora.rank}")

    return train_towers(job, recipe, prepare=prepare, finish=merge)
