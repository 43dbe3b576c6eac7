"""Learning rates that are safe, by method and kind of model, the bounds above which they are warned of, a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["learning_rate", "warm_cosine"]

# (default, bound)
_PROBE = {"probe": (2e-3, 0.05)}  # of class vectors alone, whatever the towers are
# for CLIP's own towers after CLIP-LoRA, FLYP and ViFi-CLIP: 1e-4 on all of its weights destroys it. Measured on mini
# with 16 photos of each action, validation top-1 after 14 steps, from 0.76: full 0.75 at 5e-5 and 0.65 at 2e-4, lora
# 0.76 at 3e-4
_TRANSFORMER = _PROBE | {"lora": (2e-4, 1e-3), "full": (1e-5, 3e-5), "temporal": (8e-6, 3e-5)}
_CONVOLUTIONAL = _PROBE | {"lora": (3e-4, 1e-3), "full": (5e-5, 2e-4), "temporal": (5e-5, 2e-4)}


def learning_rate(
    method: str, given: float | None, *, transformer: bool, log: Callable[[str], None] = lambda _: None
) -> float:
    """The rate to train at: the one given, else the default; ``log`` is warned when it is above the bound."""
    default, bound = (_TRANSFORMER if transformer else _CONVOLUTIONAL)[method]
    rate = default if given is None else given
    if rate > bound:
        log(
            f"WARNING: learning rate {rate:g} is above {bound:g}, which is where method {method} begins to destroy "
            f"what the model knew; {default:g} is usual"
        )
    return rate


def warm_cosine(optimizer: Optimizer, warmup_steps: int, steps: int) -> LambdaLR:
    """Half a cosine from the optimiser's rate to 0 over all ``steps``, held down as the first ones warm up."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return LambdaLR(optimizer, factor)
