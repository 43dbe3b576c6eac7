"""Stratified splits that keep near-duplicates together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["split_grouped"]


def split_grouped(
    strata: Sequence[Hashable], groups: NDArray[np.int64], fractions: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Assign each photo to a part, int64 [N] in 0..len(fractions)-1.

    Each stratum (a label) is divided by ``fractions``, which sum to 1; a group goes whole to the part that its first
    photo falls in, so parts may miss their fraction by the size of a group.
    """
    if not np.isclose(sum(fractions), 1.0):
        raise ValueError(f"fractions must sum to 1, got {sum(fractions)}")
    random = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, stratum in enumerate(strata):
        members[stratum].append(i)
    part_of_group: dict[int, int] = {}
    parts = np.zeros(len(strata), np.int64)
    bounds = np.cumsum(fractions)
    for stratum in sorted(members, key=str):
        order = random.permutation(members[stratum])
        for rank, i in enumerate(order):
            natural = int(np.searchsorted(bounds, (rank + 0.5) / len(order)))
            parts[i] = part_of_group.setdefault(int(groups[i]), min(natural, len(fractions) - 1))
    return parts
