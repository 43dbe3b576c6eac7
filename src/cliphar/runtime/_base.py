"""What the recogniser asks of an engine, and how many cores one may use."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Runtime", "cpu_quota"]


class Runtime(Protocol):
    """Runs a bundle's encoders. Safe to call from several threads. A subclass has one lane unless it says otherwise."""

    name: str
    lanes: int = 1
    """On how many threads encode_lane gets most done; 1 where encode_images uses all there is."""

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 RGB [N,S,S,3] with S the bundle's image size -> float32 [N,D], unit length; any N >= 1."""
        ...

    def encode_lane(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same, on the calling thread alone: later for one photo, more a second where all lanes have some."""
        return self.encode_images(images)

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N sentences -> float32 [N,D], unit length."""
        ...


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores allowed by the affinity mask and by the container's cgroup (v2 or v1) quota; at least 1.

    A runtime that counts the host's cores inside a container limited to two starts dozens of threads that fight
    for them.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(allowed, math.ceil(quota))) if quota else allowed


def _quota(cgroup: Path) -> float | None:
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            return None
    try:
        cores = float(limit) / float(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cores if 0 < cores < math.inf else None
