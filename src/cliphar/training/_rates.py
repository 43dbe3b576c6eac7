"""Learning rates that are safe, by method and kind of model, and the bounds above which they are warned of."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["learning_rate"]

# (default, bound); for CLIP's own towers after CLIP-LoRA, FLYP and ViFi-CLIP: 1e-4 on all of its weights destroys it.
# Measured on mini with 16 photos of each action, validation top-1 after 14 steps, from 0.76: full 0.75 at 5e-5 and 0.65
# at 2e-4, lora 0.76 at 3e-4
_TRANSFORMER = {"lora": (2e-4, 1e-3), "full": (1e-5, 3e-5), "temporal": (8e-6, 3e-5)}
_CONVOLUTIONAL = {"lora": (3e-4, 1e-3), "full": (5e-5, 2e-4), "temporal": (5e-5, 2e-4)}
_PROBE_BOUND = 0.05


def learning_rate(
    method: str, given: float | None, *, transformer: bool, log: Callable[[str], None] = lambda _: None
) -> float:
    """The rate to train at: the one given, else the default; ``log`` is warned when it is above the bound."""
    if method == "probe":
        default, bound = 2e-3, _PROBE_BOUND
    else:
        default, bound = (_TRANSFORMER if transformer else _CONVOLUTIONAL)[method]
    rate = default if given is None else given
    if rate > bound:
        log(
            f"WARNING: learning rate {rate:g} is above {bound:g}, which is where method {method} begins to destroy "
            f"what the model knew; {default:g} is usual"
        )
    return rate
