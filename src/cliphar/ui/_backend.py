"""Who answers: the recogniser in this process, or a service. The pages know only this protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Metrics
from cliphar.errors import MediaError
from cliphar.recognizer import Lesson, Prediction
from cliphar.timeline import Progress, Segment, Timeline

__all__ = ["About", "Backend", "Photo", "Watch"]


@dataclass(frozen=True)
class Photo:
    """A photo of the session: its encoded bytes and their sha256, and a small JPEG to show."""

    name: str
    data: bytes
    digest: str
    thumbnail: bytes


@dataclass(frozen=True)
class About:
    """What a model says of itself: ``card`` is Markdown, ``evaluation`` what its training measured, as
    ``Evaluation.to_dict`` has it, or None."""

    name: str
    runtime: str
    metrics: dict[str, Metrics]
    card: str
    evaluation: dict[str, Any] | None


class Watch(Protocol):
    """Answers one camera's frames, uint8 RGB [H,W,3], steadily; from one thread."""

    def __call__(self, frame: NDArray[np.uint8]) -> Prediction:
        """The answer at this frame.

        Raises:
            ClipharError: there is none; the next frame may have one.
        """
        ...

    def close(self) -> None:
        """The camera has stopped; it may start again."""
        ...


class Backend(Protocol):
    """What the pages ask for. One belongs to one session. All calls may raise a ClipharError."""

    @property
    def where(self) -> str:
        """Who answers, in words."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The actions that the model was trained on, then those it was taught."""
        ...

    @property
    def taught(self) -> dict[str, int]:
        """The actions that were taught and kept, and from how many photos each."""
        ...

    def about(self) -> About:
        """The model that answers."""
        ...

    def answer(self, photos: Sequence[Photo], labels: Sequence[str], coverage: float) -> list[Prediction | MediaError]:
        """One answer a photo, with every label in ``top``; a photo that is refused gets its error."""
        ...

    def video(self, clip: bytes, labels: Sequence[str], coverage: float) -> Iterator[Progress | Segment | Timeline]:
        """A clip's segments as they are decided, how far it is in between, the whole at last."""
        ...

    def watch(self, labels: Sequence[str]) -> Watch:
        """What answers a camera's frames."""
        ...

    def teach(self, name: str, photos: Sequence[Photo]) -> Lesson:
        """Learn an action for a trial, until it is kept or discarded."""
        ...

    def keep(self) -> None:
        """Keep what was last taught."""
        ...

    def discard(self) -> None:
        """Drop what was last taught; what was known before is as it was."""
        ...

    def forget(self, name: str) -> None:
        """Forget an action that was kept."""
        ...
