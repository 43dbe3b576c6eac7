"""What a video is answered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress", "Segment", "Timeline"]


@dataclass(frozen=True)
class Segment:
    """A stretch of video in which one thing is done; times are seconds from the start, ``end_s`` exclusive.

    ``label`` is an action or ``unknown``. ``score`` is its calibrated probability, 0..1, over all frames of the
    stretch together (of ``unknown``: the best label's). ``set`` holds the labels that together hold the true one with
    the coverage asked for, best first.
    """

    start_s: float
    end_s: float
    label: str
    score: float
    set: tuple[str, ...]

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Segment:
        """The segment of its JSON form."""
        return cls(told["start_s"], told["end_s"], told["label"], told["score"], tuple(told["set"]))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: times to milliseconds, the score to six digits."""
        return {
            "start_s": round(self.start_s, 3),
            "end_s": round(self.end_s, 3),
            "label": self.label,
            "score": round(self.score, 6),
            "set": list(self.set),
        }


@dataclass(frozen=True)
class Progress:
    """How far the reading has come; ``duration_s`` is what the file declares, or None."""

    time_s: float
    duration_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: times to milliseconds."""
        declared = None if self.duration_s is None else round(self.duration_s, 3)
        return {"time_s": round(self.time_s, 3), "duration_s": declared}


@dataclass(frozen=True)
class Timeline:
    """A video's segments in the order of their starts.

    ``duration_s`` is the length of what could be read, ``warning`` says what could not. ``frames`` frames were looked
    at, ``embedded`` of them went through the model and the others were so like the one before that its answer was
    kept; ``reuse_error`` is the largest distance, 1 - cosine, found when that was checked on some of them, or None if
    none was.
    """

    duration_s: float
    segments: tuple[Segment, ...]
    frames: int
    embedded: int
    reuse_error: float | None = None
    warning: str | None = None

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Timeline:
        """The timeline of its JSON form, as of a service or of ``cliphar video --json``."""
        segments = tuple(Segment.from_dict(one) for one in told["segments"])
        counts = told["frames"], told["embedded"], told["reuse_error"]
        return cls(told["duration_s"], segments, *counts, told.get("warning"))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``warning`` only if there is one."""
        answer: dict[str, Any] = {
            "duration_s": round(self.duration_s, 3),
            "segments": [segment.to_dict() for segment in self.segments],
            "frames": self.frames,
            "embedded": self.embedded,
            "reuse_error": None if self.reuse_error is None else round(self.reuse_error, 6),
        }
        return answer | ({"warning": self.warning} if self.warning else {})
