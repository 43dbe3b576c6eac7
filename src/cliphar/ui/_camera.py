"""A camera's frames answered and drawn upon, on the thread that streamlit-webrtc gives each camera."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cliphar.errors import ClipharError
from cliphar.recognizer import Prediction
from cliphar.ui._backend import Watch

if TYPE_CHECKING:
    import av

__all__ = ["Camera"]

_WINDOW_S = 3.0
_ROWS = 3
_PAUSE_S = 1.0


class Camera:
    """Answers the newest frame it is given and draws the answer on it; frames that come meanwhile are dropped.

    Where there is no answer the bare picture goes on, and another answer is asked for a second later. ``answer`` is
    that of the last frame that has one; ``trouble`` says why the last frame has none, or is None.

    Args:
        watch: answers the frames.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = self._wanted = watch
        self._lock = threading.Lock()
        self.answer: Prediction | None = None
        self.trouble: str | None = None
        self._asks_again = 0.0
        self._times: deque[tuple[float, float]] = deque(maxlen=300)  # when a frame was done, and how long it took

    def ask(self, watch: Watch) -> None:
        """Have another answer the frames from now on."""
        self._wanted = watch

    def recv(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame with its answer on it."""
        import av

        if self._watch is not self._wanted:  # here, on the thread that the one before answers on
            self._watch.close()
            self._watch = self._wanted
        started = time.monotonic()
        if started < self._asks_again:
            return frame
        pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        try:
            self.answer = answer = self._watch(pixels)
            drawn = _draw(pixels, answer)
        except ClipharError as error:
            self.trouble, self._asks_again = str(error), time.monotonic() + _PAUSE_S
            return frame
        self.trouble = None
        done = time.monotonic()
        with self._lock:
            self._times.append((done, done - started))
        return av.VideoFrame.from_ndarray(drawn, format="rgb24")

    def ended(self) -> None:
        """The camera was stopped."""
        self._watch.close()

    def speed(self) -> tuple[float, float] | None:
        """Frames a second and the median milliseconds from a frame to its answer, of the last seconds; or None."""
        now = time.monotonic()
        with self._lock:
            recent = [(done, took) for done, took in self._times if now - done < _WINDOW_S]
        if len(recent) < 2:
            return None
        span = recent[-1][0] - recent[0][0]
        return (len(recent) - 1) / span, 1000 * statistics.median(took for _, took in recent)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw(pixels: NDArray[np.uint8], answer: Prediction) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image, "RGBA")
    width, height = image.size
    size = max(14, height // 18)
    row = round(size * 1.5)
    top = height - row * (_ROWS + 1)
    pen.rectangle((0, top, width, height), fill=(0, 0, 0, 150))
    pen.text((size // 2, top + size // 4), answer.label, fill="white", font=_font(round(size * 1.15)))
    for number, (label, score) in enumerate(answer.top[:_ROWS], 1):
        at = top + number * row
        pen.rectangle((0, at, round(score * width), at + row - 3), fill=(18, 148, 140, 190))
        pen.text((size // 2, at + size // 6), f"{score:.0%}  {label}", fill="white", font=_font(size))
    return np.asarray(image)
