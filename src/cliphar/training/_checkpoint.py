"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cliphar.errors import UsageError, naming

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers and containers of them) beside ``path``, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # of a write that failed, such as on a disk that is full by now, torch says where in its source it was
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # else it fills a disk that is full already


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that was saved, or None; tensors only, no code is run.

    Raises:
        UsageError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes, a pickle's among them
        raise UsageError(f"{path} is damaged or cut short; copy it again, or remove it to start anew") from error
    return state
