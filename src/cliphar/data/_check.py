"""What is wrong with a data set, and what is in it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliphar.data._cache import PhotoSet

__all__ = ["DataReport", "check_photos", "doubtful_labels", "photo_stats"]

_IMBALANCE = 5.0


@dataclass(frozen=True)
class DataReport:
    """What ``check_photos`` found.

    ``refused`` are files that cannot be read, with the reason. Of the groups of near-duplicates (lists of keys),
    ``duplicates`` are all, ``across`` those that stand in more than one part, and ``conflicts`` those with more than
    one label. ``imbalance`` is the count of the commonest label over that of the rarest, and ``rare`` are labels with
    less than a fifth of the commonest's photos. ``doubts`` is what :func:`doubtful_labels` says.
    """

    photos: int
    refused: list[tuple[str, str]]
    duplicates: list[list[str]]
    across: list[list[str]]
    conflicts: list[list[str]]
    unlabelled: int
    imbalance: float
    rare: list[str]
    doubts: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return vars(self) | {"refused": [{"file": key, "reason": reason} for key, reason in self.refused]}


def check_photos(photos: PhotoSet) -> DataReport:
    """Look for unreadable files, near-duplicates within and across parts and labels, and imbalance."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(photos.groups):
        members[int(group)].append(i)
    groups = [its for its in members.values() if len(its) > 1]

    def named(chosen: list[list[int]]) -> list[list[str]]:
        return [[photos.keys[i] for i in its] for its in chosen]

    counts = Counter(label for label in photos.labels if label is not None)
    most = max(counts.values(), default=0)
    return DataReport(
        photos=len(photos),
        refused=photos.refused,
        duplicates=named(groups),
        across=named([its for its in groups if len({photos.splits[i] for i in its}) > 1]),
        conflicts=named([its for its in groups if len({photos.labels[i] for i in its} - {None}) > 1]),
        unlabelled=sum(label is None for label in photos.labels),
        imbalance=round(most / min(counts.values()), 2) if counts else 1.0,
        rare=sorted(label for label, count in counts.items() if count * _IMBALANCE < most),
        doubts=doubtful_labels(counts),
    )


def doubtful_labels(labels: Iterable[str]) -> list[str]:
    """What makes labels look like a mistake, in lines: they differ in capitals only, or are numbers."""
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        alike[label.casefold()].append(label)
    doubts = [f"labels that differ in capitals only: {', '.join(its)}" for its in alike.values() if len(its) > 1]
    numbers = [label for label in alike if re.fullmatch(r"-?\d+([.]\d+)?", label)]
    if numbers:
        doubts.append(f"labels that are numbers: {', '.join(numbers[:5])}; a model starts from words, so name them")
    return doubts


def photo_stats(photos: PhotoSet) -> dict[str, Any]:
    """Counts by label and by part, captions, and the sides of the photos as they are cached."""
    shapes = np.array([photos.frames(i).shape for i in range(len(photos))])
    parts = Counter(split or "none" for split in photos.splits)
    return {
        "photos": len(photos),
        "refused": len(photos.refused),
        "labels": dict(sorted(Counter(label for label in photos.labels if label is not None).items())),
        "parts": dict(sorted(parts.items())),
        "captions": sum(map(len, photos.captions)),
        "clips": int((photos.seconds > 0).sum()),
        "median_width": int(np.median(shapes[:, 2])),
        "median_height": int(np.median(shapes[:, 1])),
        "sha256": photos.sha256,
    }
