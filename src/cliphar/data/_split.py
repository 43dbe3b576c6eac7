"""Parts of a data set: those that it names, and stratified splits that keep near-duplicates together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from cliphar.data._cache import PhotoSet
from cliphar.data._readers import SPLITS

__all__ = ["assign_parts", "split_grouped"]

_TRAIN, _VAL, _TEST = range(len(SPLITS))


def assign_parts(photos: PhotoSet, val: float, test: float, seed: int) -> NDArray[np.int64]:
    """int64 [N]: 0 for train, 1 for val, 2 for test, -1 for what is in none.

    Parts that the source names hold. ``val`` and ``test``, where it names none, are drawn as these shares of train;
    where it names no train, that is all that has no part.
    """
    part = np.array([SPLITS.index(split) if split else -1 for split in photos.splits], np.int64)
    if _TRAIN not in part:
        part[part < 0] = _TRAIN
    missing = [(which, share) for which, share in ((_VAL, val), (_TEST, test)) if which not in part]
    inside = np.flatnonzero(part == _TRAIN)
    shares = [share for _, share in missing]
    drawn = split_grouped([photos.labels[i] for i in inside], photos.groups[inside], (1 - sum(shares), *shares), seed)
    for number, (which, _) in enumerate(missing, 1):
        part[inside[drawn == number]] = which
    return part


def split_grouped(
    strata: Sequence[Hashable], groups: NDArray[np.int64], fractions: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Assign each photo to a part, int64 [N] in 0..len(fractions)-1.

    Each stratum (a label) is divided by ``fractions``, which sum to 1; a group goes whole to the part that its middle
    falls in, so parts may miss their fraction by the size of a group. Where the strata are so small that a part would
    get nothing, they take turns in giving to it.
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
        for stratum, offset in zip(sorted(members, key=str), offsets, strict=True):
            order = random.permutation(members[stratum])
            rank = 0
            for group, size in Counter(groups[order].tolist()).items():  # in the order of their first photos
                natural = int(np.searchsorted(bounds, (rank + size * offset) / len(order)))
                part_of_group.setdefault(group, min(natural, len(fractions) - 1))
                rank += size
        return np.array([part_of_group[group] for group in groups.tolist()], np.int64)

    parts = assign(np.full(len(members), 0.5))
    if set(np.flatnonzero(fractions)) <= set(parts.tolist()):
        return parts
    return assign((np.arange(len(members)) + 0.5) / len(members))
