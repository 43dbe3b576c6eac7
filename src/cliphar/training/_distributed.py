"""Several processes that train one model: DDP (a copy each) and FSDP2 (a share each).

Li et al., "PyTorch Distributed", 2020 (https://arxiv.org/abs/2006.15704); Zhao et al., "PyTorch FSDP", 2023
(https://arxiv.org/abs/2304.11277), in its second form, ``fully_shard``.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliphar.errors import ClipharError
from cliphar.training._loop import Stopped
from cliphar.training._ranks import OneProcess, Ranks

__all__ = ["ManyProcesses", "first_speaks", "is_first", "leave_ranks", "open_ranks"]

_CPU = torch.device("cpu")
_FIRST_S = 60.0


class _Gather(torch.autograd.Function):
    """Rows of all processes in one tensor, with gradients: what a contrastive loss takes its negatives from.

    The loss of each process is over its own rows against everybody's. The gradient of a row is then the sum of what
    every process's loss says of it, and the mean of gradients that data-parallel training takes is the whole batch's.
    """

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


class ManyProcesses(OneProcess):
    """See :class:`Ranks`. The process group must be there; ``kind`` is ``ddp`` or ``fsdp``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        on_gpu = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else _CPU
        # all but one wait while photos are read and the bundle is written, longer than steps that hang may take
        self.waiting = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def __deepcopy__(self, _: dict[int, Any]) -> ManyProcesses:
        return self  # a copied module gathers among the same processes

    def wrap(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        """See :class:`Ranks`."""
        if self.kind == "ddp":
            # the older name serves every torch from 2.9 on; 1 x 1 kernels have strides that are equal in all but name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated|Grad strides do not match")
            # batch norms keep their statistics, so there are no buffers to bring in line
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False), module
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self.world,))  # by itself it takes GPUs where there are any

        sharded = copy.deepcopy(module)  # the whole one stays, to be validated and exported
        for part in sharded.modules():
            if type(part) is nn.ModuleList:  # and not the list of a weight's parametrisations
                for block in part:
                    if any(p.requires_grad for p in block.parameters()):
                        fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        return sharded, sharded

    def gather(self, rows: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
        return gathered

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
            self.wait()
        yield
        if not self.rank:
            self.wait()

    def wait(self) -> None:
        """See :class:`Ranks`."""
        dist.barrier(self.waiting)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the first of those that torchrun (or Ray) started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def open_ranks(kind: str = "ddp", device: torch.device = _CPU) -> Ranks:
    """This process, which trains on ``device``, among those that torchrun (or Ray) started with it: by NCCL or gloo."""
    if _processes() == 1:
        return OneProcess()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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


@contextmanager
def first_speaks() -> Iterator[None]:
    """Where all processes fail alike, the first alone says why.

    Raises:
        ClipharError: the first lost another; what it was in says nothing of why.
    """
    try:
        yield
    except Stopped:
        raise
    except (ClipharError, OSError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        if isinstance(error, RuntimeError) and not lost:
            raise
        if not is_first() and _processes() > 1:
            # torchrun ends all as soon as one has ended, and the first may have a tracked run to close before that
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_FIRST_S)
        if lost:
            why = str(error).split(". ")[0].rpartition("] ")[2] or type(error).__name__
            raise ClipharError(
                f"another process of this training is gone ({why}); see what it and torchrun say, then give --resume"
            ) from error
        raise
