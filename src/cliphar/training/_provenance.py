"""Where a bundle came from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from cliphar.bundle import Provenance

__all__ = ["provenance"]


def provenance(settings: dict[str, Any], data_sha256: str, seed: int, gpus: str = "") -> Provenance:
    """Of what is made here and now by a recipe's ``settings``; ``gpus`` is what stands behind the CPU's cores."""
    packages = ("torch", "onnx", "onnxruntime", "numpy", "tokenizers", "pillow")
    return Provenance(
        recipe=settings,
        data_sha256=data_sha256,
        git_revision=_code_revision(),
        seed=seed,
        versions={name: metadata.version(name) for name in packages},
        hardware=f"{platform.machine()}, {torch.get_num_threads()} CPU cores{gpus}",
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _code_revision() -> str:
    """CLIPHAR_REVISION, which an image is built with; else the working directory's git commit; else ``unknown``."""
    told = os.environ.get("CLIPHAR_REVISION")
    if told:
        return told
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # there is no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
