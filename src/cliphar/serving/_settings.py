"""What a service is told: by flags, by CLIPHAR_* variables, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cliphar.bundle import store
from cliphar.labels import MAX_LABELS
from cliphar.serving._problems import ProblemError

__all__ = ["Settings"]


def _state() -> Path:
    return store().parent / "state"


class Settings(BaseModel):
    """Bounds and switches. Every one of them is also a flag of ``cliphar serve`` or a variable CLIPHAR_NAME."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    runtime: str | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    provider: str | None = None
    state: Path = Field(default_factory=_state)
    queue_size: int = Field(default=256, ge=1)
    max_batch: int = Field(default=16, ge=1, le=256)
    keep_photos: int = Field(default=1024, ge=0)
    deadline_s: float = Field(default=30.0, gt=0)
    max_body_mb: int = Field(default=64, ge=1)
    max_images: int = Field(default=64, ge=1)
    max_pixels: int = Field(default=50_000_000, ge=1)
    max_labels: int = Field(default=500, ge=1, le=MAX_LABELS)
    api_keys: Path | None = None
    rate_per_minute: Annotated[int, Field(ge=1)] | None = None
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    image_urls: bool = False

    @property
    def most_files(self) -> int:
        """How many a form may have to be looked at: one more than images, so that those are refused in our words."""
        return max(1000, self.max_images + 1)

    def check_images(self, count: int) -> None:
        """ProblemError 413 if a call may not have so many images."""
        if count > self.max_images:
            raise ProblemError(413, f"{count} images are too many for one call; at most {self.max_images}")
