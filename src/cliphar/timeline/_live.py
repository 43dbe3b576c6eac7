"""Steady answers while a camera runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.errors import UsageError
from cliphar.media import ImageLike, decode_image
from cliphar.recognizer import Prediction, Recognizer
from cliphar.timeline._changes import Changes
from cliphar.timeline._tracker import LIVE_CHANGE, Tracker, choose
from cliphar.timeline._types import Segment

__all__ = ["Live", "LiveAnswer"]

_OUT_OF_ORDER_S = 1.0  # a clock that goes back by more was set, or began anew as when a camera is connected to again


@dataclass(frozen=True)
class LiveAnswer:
    """What is done now, steadied by the moments before; times are seconds since the first frame.

    ``prediction`` is scored over the last second or so of what is done now; its label is the smoothed one. ``since_s``
    is when it began. ``closed`` are the segments that this frame decided; they come late and are sure.
    """

    time_s: float
    since_s: float
    prediction: Prediction
    closed: tuple[Segment, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the prediction with ``time_s``, ``since_s`` and ``closed``."""
        times = {"time_s": round(self.time_s, 3), "since_s": round(self.since_s, 3)}
        return times | self.prediction.to_dict() | {"closed": [segment.to_dict() for segment in self.closed]}


class Live:
    """Takes the frames of one camera in the order of time. Not for several threads at once.

    Frames may come at any rate and be left out at will: hand over the newest one whenever there is time for it. If
    their clock goes back by more than a second, it began anew: time goes on from the last frame.

    Args:
        recognizer: the model; it may be shared.
        labels: any actions in plain words; None takes the recogniser's own.
        coverage: how often a prediction set should hold the true label, between 0 and 1.
        top_k: how many labels an answer's ``top`` holds at most.
        fps: how many frames a second are looked at, 0.01 to 60; None takes what the bundle names.

    Raises:
        UsageError: bad labels or numbers.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        labels: Iterable[str] | None = None,
        *,
        coverage: float = 0.9,
        top_k: int = 5,
        fps: float | None = None,
    ) -> None:
        self._coverage, self._fps, self._top_k = coverage, fps, top_k
        self._first_s: float | None = None
        self._last_s = self._since_s = 0.0
        self._ended: tuple[Segment, ...] = ()
        self._begin(recognizer, labels)

    def _begin(self, recognizer: Recognizer, labels: Iterable[str] | None) -> None:
        choice = choose(recognizer, labels, self._coverage, False, self._fps)
        self._recognizer, self._choice = recognizer, choice
        self._changes, self._tracker = Changes(), Tracker(choice, LIVE_CHANGE)
        self._vector: NDArray[np.float32] | None = None

    def change_model(self, recognizer: Recognizer, labels: Iterable[str] | None = None) -> None:
        """Go on with another model. What is open ends at the last frame; the next answer's ``closed`` holds it.

        Raises:
            UsageError: bad labels; nothing is changed then.
        """
        before = self._tracker
        self._begin(recognizer, labels)
        self._ended += tuple(before.flush(self._last_s))

    @property
    def fps(self) -> float:
        """The frames a second that are worth pushing; more make answers no better."""
        return self._choice.fps

    def push(self, frame: ImageLike, time_s: float) -> LiveAnswer:
        """Answer for a frame: uint8 RGB [H,W,3], or anything that is a photo, at ``time_s`` seconds on any clock.

        Raises:
            MediaError: it is not a picture that can be read; the next frame may be.
            UsageError: ``time_s`` is not finite.
        """
        image = decode_image(frame, min_side=self._recognizer.bundle.info.image.size)
        time_s = self._since_first(time_s)
        luma = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX))
        fresh, check, cut = self._changes.look(luma, time_s)
        if fresh or self._vector is None:
            new = self._recognizer.runtime.encode_images(self._recognizer.prepare(image)[None])[0]
            if check and self._vector is not None:
                self._changes.checked(self._vector, new)
            self._vector = new
        return self._take(self._vector, time_s, cut)

    def push_embedding(self, embedding: NDArray[np.float32], time_s: float) -> LiveAnswer:
        """Answer for a frame that was embedded elsewhere: float32 [D], unit length. Cuts are not looked for."""
        return self._take(embedding, self._since_first(time_s), False)

    def _since_first(self, time_s: float) -> float:
        if not math.isfinite(time_s):  # no later frame would be later
            raise UsageError(f"a frame cannot be at {time_s} s; give its time in seconds, on any clock")
        if self._first_s is None:
            self._first_s = time_s
        if time_s - self._first_s < self._last_s - _OUT_OF_ORDER_S:  # else nothing would be new until it catches up
            self._first_s = time_s - self._last_s
        return max(time_s - self._first_s, self._last_s)

    def _take(self, embedding: NDArray[np.float32], time_s: float, cut: bool) -> LiveAnswer:
        self._last_s = time_s
        before = self._tracker.current
        closed = self._tracker.push(time_s, embedding, cut)
        if self._tracker.current != before:
            self._since_s = time_s
        self._since_s = max(self._since_s, self._tracker.began_s)
        now, ended, self._ended = self._tracker.now(), self._ended, ()
        return LiveAnswer(time_s, self._since_s, replace(now, top=now.top[: self._top_k]), (*ended, *closed))

    def close(self) -> tuple[Segment, ...]:
        """The last segments; nothing may be pushed after."""
        return (*self._ended, *self._tracker.flush(self._last_s))
