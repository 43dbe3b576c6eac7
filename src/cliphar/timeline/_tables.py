"""Segments as text: CSV and WebVTT."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from cliphar.labels import with_score
from cliphar.timeline._types import Segment

__all__ = ["to_csv", "to_webvtt"]


def to_csv(segments: Iterable[Segment]) -> str:
    """A table with a heading: start_s, end_s, label, score, set."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["start_s", "end_s", "label", "score", "set"])
    for segment in segments:
        row = segment.to_dict()
        table.writerow([row["start_s"], row["end_s"], row["label"], row["score"], "; ".join(row["set"])])
    return out.getvalue()


def to_webvtt(segments: Iterable[Segment]) -> str:
    """Subtitles (W3C WebVTT), one cue a segment."""
    cues = [
        f"{_clock(segment.start_s)} --> {_clock(segment.end_s)}\n{_escaped(with_score(segment.label, segment.score))}\n"
        for segment in segments
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _clock(seconds: float) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
