"""What a recogniser takes, and what it answers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

__all__ = ["Prediction", "Score", "still"]


class Score(NamedTuple):
    """A label with its calibrated probability among the labels asked for, 0..1."""

    label: str
    score: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo.

    ``label`` is the best label, or ``unknown`` where the best evidence is below the bundle's threshold; ``score`` is
    the best label's probability either way. ``set`` holds the labels that together hold the true one with the
    coverage asked for, best first. ``top`` is the best labels with their scores. ``evidence`` is the best label's
    cosine, -1..1, which does not depend on the other labels.
    """

    label: str
    score: float
    set: tuple[str, ...]
    top: tuple[Score, ...]
    evidence: float

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Prediction:
        """The answer of its JSON form; ``cliphar predict`` writes no evidence, so that of its lines is nan."""
        top = tuple(Score(one["label"], one["score"]) for one in told["top"])
        return cls(told["label"], told["score"], tuple(told["set"]), top, told.get("evidence", math.nan))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; scores and evidence to six digits. Evidence of nan, which JSON lacks, is left out."""
        told: dict[str, Any] = {
            "label": self.label,
            "score": round(self.score, 6),
            "set": list(self.set),
            "top": [{"label": label, "score": round(score, 6)} for label, score in self.top],
        }
        return told if math.isnan(self.evidence) else told | {"evidence": round(self.evidence, 6)}


def still(image: Any) -> Any:
    """The image as it is now: its giver may fill it anew, as cameras and PIL's ImageSequence do, or close its file."""
    try:
        if not getattr(image, "tile", ()) or getattr(image, "is_animated", False):
            return image.copy()
        image.fp.seek(0)  # as decoding does, which is left to threads
        return Image.open(io.BytesIO(image.fp.read()), formats=[image.format])
    except Exception:  # damaged: who decodes it says so
        return image
