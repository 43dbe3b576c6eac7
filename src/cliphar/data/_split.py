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
    photo falls in, so parts may miss their fraction by the size of a group. Where the strata are so small that a part
    would get nothing, they take turns in giving to it.
    """
    if not np.isclose(sum(fractions), 1.0):
        raise ValueError(f"fractions must sum to 1, got {sum(fractions)}")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, stratum in enumerate(strata):
        members[stratum].append(i)
    bounds = np.cumsum(fractions)

    def assign(offsets: NDArray[np.float64]) -> NDArray[np.int64]:
        random = np.random.default_rng(seed)
        part_of_group: dict[int, int] = {}
        parts = np.zeros(len(strata), np.int64)
        for stratum, offset in zip(sorted(members, key=str), offsets, strict=True):
            order = random.permutation(members[stratum])
            for rank, i in enumerate(order):
                natural = int(np.searchsorted(bounds, (rank + offset) / len(order)))
                parts[i] = part_of_group.setdefault(int(groups[i]), min(natural, len(fractions) - 1))
        return parts

    parts = assign(np.full(len(members), 0.5))
    if set(np.flatnonzero(fractions)) <= set(parts.tolist()):
        return parts
    return assign((np.arange(len(members)) + 0.5) / len(members))
