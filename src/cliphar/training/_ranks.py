"""The processes that train together. The loop asks these few questions; one process answers them simply."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

__all__ = ["OneProcess", "Ranks"]


class Ranks(Protocol):
    """``rank`` of ``world`` processes. Weights (on the CPU) and optimiser states are whole and keyed by name, so a
    checkpoint of one kind of run is taken up by any other."""

    rank: int
    world: int

    def wrap(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The module as it is called in training, and the one that holds the parameters to be stepped."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [B,...] of every process, in order of rank [world*B,...], with gradients."""
        ...

    def mean(self, value: float) -> float:
        """The mean over processes."""
        ...

    def any(self, flag: int) -> int:
        """The largest of all processes' flags."""
        ...

    def first(self) -> AbstractContextManager[None]:
        """The block runs in the first process, and then, when it is done there, in the others."""
        ...

    def wait(self) -> None:
        """Until every process is here."""
        ...

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """The trained weights and all buffers."""
        ...

    def load_weights(self, module: nn.Module, weights: dict[str, Any]) -> None:
        """Put back what ``weights`` gave."""
        ...

    def optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state."""
        ...

    def load_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Put back what ``optimizer_state`` gave."""
        ...


_WHOLE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
_LOADED = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class OneProcess:
    """See :class:`Ranks`."""

    rank = 0
    world = 1

    def wrap(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        """See :class:`Ranks`."""
        return module, module

    def gather(self, rows: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return rows

    def mean(self, value: float) -> float:
        """See :class:`Ranks`."""
        return value

    def any(self, flag: int) -> int:
        """See :class:`Ranks`."""
        return flag

    def first(self) -> AbstractContextManager[None]:
        """See :class:`Ranks`."""
        return nullcontext()

    def wait(self) -> None:
        """See :class:`Ranks`."""

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """See :class:`Ranks`."""
        found: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
        # a copy: what is returned must not change when training goes on
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
