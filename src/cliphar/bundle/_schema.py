"""What bundle.json says. Frozen, and unknown keys are refused."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cliphar.errors import one_line

__all__ = [
    "SCHEMA_VERSION",
    "BundleInfo",
    "Calibration",
    "FileInfo",
    "ImageSpec",
    "Metrics",
    "Provenance",
    "Source",
    "TextSpec",
    "VideoSpec",
]

SCHEMA_VERSION = 1

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageSpec(_Model):
    """How a decoded photo becomes the uint8 RGB square that the image graph takes.

    The photo is centre-cropped until its long side is at most ``max_aspect`` times its short side, then
    resized to ``size`` x ``size`` pixels. ``max_aspect`` 1 is CLIP's centre crop; larger keeps more of the scene
    at the price of a squeeze.
    """

    size: int = Field(ge=16, le=2048)
    max_aspect: float = Field(default=1.0, ge=1.0, le=4.0)


class TextSpec(_Model):
    """How a label becomes token ids: each template's ``{}`` is replaced, tokens cut to ``context_length``.

    ``centred`` is the share, 0..1, of their part along the mean of the bundle's background photos that label vectors
    lose where they are compared by words: all photos answer to it alike (Suzuki et al., 2013).
    """

    templates: tuple[str, ...] = Field(min_length=1)
    context_length: int = Field(ge=4, le=512)
    centred: float = Field(default=0.0, ge=0, le=1)

    @field_validator("templates")
    @classmethod
    def _has_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} exactly once")
        return templates


class VideoSpec(_Model):
    """How a video is looked at: ``fps`` frames a second, and the mean of ``window_s`` seconds of them is scored.

    A model trained on single photos has no window (0); one whose class vectors were trained on the mean embedding of
    clips names the length of those.
    """

    fps: float = Field(default=4.0, ge=0.01, le=60)
    window_s: float = Field(default=0.0, ge=0, le=60)


class Calibration(_Model):
    """Numbers fitted on photos that training never saw, for one way of scoring.

    ``logit_scale`` multiplies cosines before the softmax (the inverse temperature; Guo et al., 2017).
    ``conformal`` maps a coverage to the threshold on a label's nonconformity: labels at or under it form the prediction
    set (split conformal prediction; Vovk et al., 2005). It is 1 - p(label) (Sadinle et al., 2019) or, with a
    ``margin``, the best cosine times ``margin`` less the label's own, which other labels change less.
    ``unknown_below`` is the cosine of the best label under which the answer is ``unknown``. ``photos`` is how many
    photos the fit saw.
    """

    logit_scale: float = Field(gt=0)
    margin: float | None = Field(default=None, ge=0, le=1)
    conformal: tuple[tuple[float, float], ...] = Field(min_length=1)
    unknown_below: float = Field(ge=-1, le=1)
    photos: int = Field(ge=1)

    @field_validator("conformal")
    @classmethod
    def _ascending(cls, pairs: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        coverages = [coverage for coverage, _ in pairs]
        thresholds = [threshold for _, threshold in pairs]
        if coverages != sorted(set(coverages)) or thresholds != sorted(thresholds):
            raise ValueError("conformal must be ascending in coverage and in threshold")
        return pairs

    @classmethod
    def unfitted(cls, logit_scale: float) -> Calibration:
        """Where there are no photos to fit to: a prediction set holds every label, and no answer is ``unknown``."""
        return cls(logit_scale=logit_scale, conformal=((0.9, 1.0),), unknown_below=-1.0, photos=1)


class Metrics(_Model):
    """One evaluation: what was measured, on how many photos. Fractions are in 0..1."""

    description: str
    n: int = Field(ge=0)
    values: dict[str, float]


class Source(_Model):
    """A thing the weights learned from, and on what terms."""

    name: str
    role: str
    licence: str


class Provenance(_Model):
    """Where the bundle came from: enough to make it again."""

    recipe: dict[str, Any]
    data_sha256: str
    git_revision: str
    seed: int
    versions: dict[str, str]
    hardware: str
    created: str


class FileInfo(_Model):
    """One file of the bundle; ``parity`` compares a runtime's file with the reference it was made from."""

    sha256: _Sha256
    bytes: int = Field(ge=0)
    runtime: str | None = None
    parity: dict[str, float] | None = None

    def for_other_labels(self) -> FileInfo:
        """The same file, without what ``parity`` says of answers: these were other labels'."""
        of_answers = ("agreement", "accuracy", "difference")
        kept = {key: value for key, value in (self.parity or {}).items() if not key.startswith(of_answers)}
        return self.model_copy(update={"parity": kept or None})


def is_inside(path: str) -> bool:
    """Whether a file's path in a bundle is relative, with forward slashes, and stays below it on every system."""
    pure = PurePosixPath(path)
    return bool(path) and "\\" not in path and ":" not in path and not pure.is_absolute() and ".." not in pure.parts


class BundleInfo(_Model):
    """The whole of bundle.json."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str
    labels: tuple[str, ...]
    embedding_dim: int = Field(ge=1)
    image: ImageSpec
    text: TextSpec
    video: VideoSpec = VideoSpec()
    known: Calibration
    open: Calibration
    metrics: dict[str, Metrics] = {}
    sources: tuple[Source, ...] = ()
    limits: tuple[str, ...] = ()
    provenance: Provenance
    files: dict[str, FileInfo] = {}

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        for path in files:
            if not is_inside(path):
                raise ValueError(f"path {path!r} leaves the bundle")
        return files

    @model_validator(mode="after")
    def _labels_differ(self) -> BundleInfo:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels repeat")
        if any(one_line(label) != label for label in self.labels):
            raise ValueError("a label holds control characters")
        return self
