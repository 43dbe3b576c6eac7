"""Metrics of timelines against true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cliphar.labels import UNKNOWN
from cliphar.timeline import Segment

__all__ = ["Span", "segment_f1", "temporal_map"]


class Span(NamedTuple):
    """A true stretch of video: seconds from its start, ``end_s`` exclusive, and the action or ``unknown``."""

    start_s: float
    end_s: float
    label: str


class _Stretch(Protocol):
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def label(self) -> str: ...


def segment_f1(
    truth: Sequence[Sequence[Span]],
    predicted: Sequence[Sequence[_Stretch]],
    overlaps: Sequence[float] = (0.1, 0.25, 0.5),
) -> dict[float, float]:
    """Segmental F1 for each overlap, 0..1 (Lea et al., Temporal Convolutional Networks, 2017).

    A predicted segment is right if its overlap (intersection over union of the times) with a true one of its label
    reaches the threshold and no segment before it took that one. All videos are counted together. ``unknown`` is
    background: it is never right or missed, but an action said in its place is wrong.

    Args:
        truth: the true segments of each video.
        predicted: the found ones of the same videos, in the order of time.
        overlaps: thresholds, above 0 up to 1.

    Raises:
        ValueError: not as many videos on both sides.
    """
    pairs = [(_actions(t), _actions(p)) for t, p in zip(truth, predicted, strict=True)]
    true, found = sum(len(t) for t, _ in pairs), sum(len(p) for _, p in pairs)
    figures = {}
    for overlap in overlaps:
        hits = 0
        for actual, claims in pairs:
            taken: set[int] = set()
            for claim in claims:
                ious = _ious(claim, actual)
                best = int(ious.argmax()) if len(ious) else -1
                if best >= 0 and ious[best] >= overlap and best not in taken:
                    taken.add(best)
                    hits += 1
        figures[overlap] = 2 * hits / (true + found) if true + found else 1.0
    return figures


def temporal_map(
    truth: Sequence[Sequence[Span]],
    predicted: Sequence[Sequence[Segment]],
    overlaps: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
) -> dict[float, float]:
    """Mean average precision for each temporal overlap, 0..1, as ActivityNet measures it (Heilbron et al., 2015).

    The segments of a label, of all videos, are taken by falling score; each may take the free true segment of its video
    that it overlaps most. Average precision is the area under the interpolated curve of precision over recall; it is
    averaged over the labels that occur in ``truth``. ``unknown`` is background.

    Args:
        truth: the true segments of each video.
        predicted: the found ones of the same videos, in any order.
        overlaps: thresholds, above 0 up to 1.

    Raises:
        ValueError: not as many videos on both sides, or no action in ``truth``.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"{len(predicted)} timelines for {len(truth)} videos")
    labels = sorted({one.label for video in truth for one in _actions(video)})
    if not labels:
        raise ValueError("there is no action in the true timelines")
    return {
        overlap: float(np.mean([_average_precision(truth, predicted, label, overlap) for label in labels]))
        for overlap in overlaps
    }


def _average_precision(
    truth: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Segment]], label: str, overlap: float
) -> float:
    actual = [[one for one in video if one.label == label] for video in truth]
    claims = [(at, one) for at, video in enumerate(predicted) for one in video if one.label == label]
    claims.sort(key=lambda claim: -claim[1].score)
    taken: set[tuple[int, int]] = set()
    hits = np.zeros(len(claims))
    for rank, (at, claim) in enumerate(claims):
        ious = _ious(claim, actual[at])
        for best in np.argsort(-ious, kind="stable"):
            if ious[best] >= overlap and (at, int(best)) not in taken:
                taken.add((at, int(best)))
                hits[rank] = 1
                break
    right = hits.cumsum()
    recall = np.concatenate([[0.0], right / sum(len(video) for video in actual)])
    precision = right / np.arange(1, len(claims) + 1)
    # the best precision at this recall or a higher one
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * envelope).sum())


def _actions(video: Sequence[_Stretch]) -> list[_Stretch]:
    return [one for one in video if one.label != UNKNOWN]


def _ious(claim: _Stretch, actual: Sequence[_Stretch]) -> NDArray[np.float64]:
    """Overlap with each true segment, float64 [N]; 0 where the label is another."""
    return np.array([_iou(claim, one) if one.label == claim.label else 0.0 for one in actual])


def _iou(a: _Stretch, b: _Stretch) -> float:
    shared = max(0.0, min(a.end_s, b.end_s) - max(a.start_s, b.start_s))
    union = (a.end_s - a.start_s) + (b.end_s - b.start_s) - shared
    return shared / union if union > 0 else 0.0
