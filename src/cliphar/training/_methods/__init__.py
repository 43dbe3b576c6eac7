"""The methods of training, by the name that a recipe gives."""

from __future__ import annotations

from collections.abc import Callable

from cliphar.training._job import Job, Outcome
from cliphar.training._methods._full import full
from cliphar.training._methods._gda import gda
from cliphar.training._methods._lora import lora
from cliphar.training._methods._probe import probe
from cliphar.training._methods._zero_shot import zero_shot

__all__ = ["METHODS"]

METHODS: dict[str, Callable[[Job], Outcome]] = {
    "zero-shot": zero_shot,
    "gda": gda,
    "probe": probe,
    "lora": lora,
    "full": full,
    "temporal": full,
}
