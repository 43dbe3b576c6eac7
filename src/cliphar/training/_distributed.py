"""Several processes that train one model: DDP (a copy each) and FSDP2 (a share each).

Li et al., "PyTorch Distributed", 2020 (https://arxiv.org/abs/2006.15704); Zhao et al., "PyTorch FSDP", 2023
(https://arxiv.org/abs/2304.11277), in its second form, ``fully_shard``.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cliphar.training._gather import gather_rows
from cliphar.training._ranks import OneProcess, Ranks

__all__ = ["ManyProcesses", "leave_ranks", "open_ranks"]

_WHOLE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
_LOADED = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class ManyProcesses:
    """See :class:`Ranks`. The process group must be there; ``kind`` is ``ddp`` or ``fsdp``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        on_gpu = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")

    def wrap(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        """See :class:`Ranks`."""
        if self.kind == "ddp":
            # the older name serves every torch from 2.9 on; 1 x 1 kernels have strides that are equal in all but name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated|Grad strides do not match")
            # batch norms keep their statistics, so there are no buffers to bring in line
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False), module
        from torch.distributed.fsdp import fully_shard

        sharded = copy.deepcopy(module)  # the whole one stays, to be validated and exported
        for part in sharded.modules():
            if type(part) is nn.ModuleList:  # and not the list of a weight's parametrisations
                for block in part:
                    if any(p.requires_grad for p in block.parameters()):
                        fully_shard(block)
        fully_shard(sharded)
        return sharded, sharded

    def gather(self, rows: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return gather_rows(rows)

    def mean(self, value: float) -> float:
        """See :class:`Ranks`."""
        total = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total) / self.world

    def any(self, flag: int) -> int:
        """See :class:`Ranks`."""
        most = torch.tensor([flag], device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    @contextmanager
    def first(self) -> Iterator[None]:
        """See :class:`Ranks`."""
        if self.rank:
            dist.barrier()
        yield
        if not self.rank:
            dist.barrier()

    def wait(self) -> None:
        """See :class:`Ranks`."""
        dist.barrier()

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """See :class:`Ranks`."""
        found: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    def load_weights(self, module: nn.Module, weights: dict[str, Any]) -> None:
        """See :class:`Ranks`."""
        set_model_state_dict(module, dict(weights), options=_LOADED)

    def optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See :class:`Ranks`."""
        return get_optimizer_state_dict(module, optimizer, options=_WHOLE)

    def load_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """See :class:`Ranks`."""
        set_optimizer_state_dict(module, optimizer, state, options=_LOADED)


def open_ranks(kind: str) -> Ranks:
    """This process among those that torchrun (or Ray) started with it: NCCL with a GPU each, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return ManyProcesses(kind)


def leave_ranks(status: int) -> None:
    """End this process with exit ``status`` if it is one of several; alone, do nothing.

    Torch's caches of a sharded model hold gloo's threads past ``destroy_process_group``. One that lets go of its last
    tensor while the interpreter ends aborts the process, and with it a training that is done
    (https://github.com/pytorch/pytorch/issues/190489), so the interpreter's end is left out.
    """
    if not dist.is_initialized():
        return
    dist.barrier()  # one that leaves while another still talks to it is aborted too
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
