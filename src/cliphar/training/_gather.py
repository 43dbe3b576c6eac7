"""Rows of all processes in one tensor, with gradients: what a contrastive loss takes its negatives from.

The loss of each process is over its own rows against everybody's. The gradient of a row is then the sum of what every
process's loss says of it, and the mean of gradients that data-parallel training takes is the whole batch's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_rows"]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [B,...], as many in every process, in order of rank: [world*B,...]. Differentiable if they are floats."""
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered
