"""How many cores this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["cpu_quota"]


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
