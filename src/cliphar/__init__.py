"""cliphar: what are the people in this picture doing?

>>> import cliphar
>>> recognizer = cliphar.load("mini")
>>> recognizer.predict("photo.jpg", labels=["riding a bike", "cooking"]).label
'riding a bike'

Names are resolved on first use, so ``import cliphar`` costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cliphar._version import __version__

if TYPE_CHECKING:
    from cliphar.errors import BundleError, ClipharError, MediaError, UsageError
    from cliphar.recognizer import Prediction, Recognizer, load

# ONNX Runtime 1.32 gives the machine a number, kept in the home, and tells its makers of each session; read as it loads
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # and a Ray that is started here

__all__ = [
    "BundleError",
    "ClipharError",
    "MediaError",
    "Prediction",
    "Recognizer",
    "UsageError",
    "__version__",
    "load",
]

_HOMES = {
    "BundleError": "cliphar.errors",
    "ClipharError": "cliphar.errors",
    "MediaError": "cliphar.errors",
    "Prediction": "cliphar.recognizer",
    "Recognizer": "cliphar.recognizer",
    "UsageError": "cliphar.errors",
    "load": "cliphar.recognizer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cliphar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__  # what a notebook completes and help() lists, though it is not there yet
