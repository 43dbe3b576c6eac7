"""What a run tells whoever keeps a record of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["NoTracker", "Tracker"]


class Tracker(Protocol):
    """Keeps parameters, metrics and files of a run. None of its methods may fail the run."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """The recipe and what it ran on; nested mappings are allowed."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values after so many steps of the optimiser; names such as ``train/loss`` and ``val/score``."""
        ...

    def log_artifact(self, path: Path) -> None:
        """A file, or a folder such as the bundle."""
        ...

    def close(self, *, stopped: bool = False) -> None:
        """The run is over, or was ``stopped`` by a signal."""
        ...


class NoTracker:
    """Keeps nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""

    def log_artifact(self, path: Path) -> None:
        """See :class:`Tracker`."""

    def close(self, *, stopped: bool = False) -> None:
        """See :class:`Tracker`."""
