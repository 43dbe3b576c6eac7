"""A video's timeline."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cliphar.media import Frame, VideoLike, VideoReader, to_square
from cliphar.recognizer import Recognizer
from cliphar.timeline._changes import Changes
from cliphar.timeline._tracker import Choice, Tracker, choose
from cliphar.timeline._types import Progress, Segment, Timeline

__all__ = ["recognize_video", "stream_video", "to_input"]

_AHEAD = 32  # frames looked at before the model runs on those of them that changed


def recognize_video(
    recognizer: Recognizer,
    source: VideoLike,
    labels: Iterable[str] | None = None,
    *,
    coverage: float = 0.9,
    multi_label: bool = False,
    fps: float | None = None,
) -> Timeline:
    """What is done when: see ``stream_video``, whose last item this is."""
    items = stream_video(recognizer, source, labels, coverage=coverage, multi_label=multi_label, fps=fps)
    with closing(items):
        return next(item for item in items if isinstance(item, Timeline))


def stream_video(
    recognizer: Recognizer,
    source: VideoLike,
    labels: Iterable[str] | None = None,
    *,
    coverage: float = 0.9,
    multi_label: bool = False,
    fps: float | None = None,
) -> Generator[Progress | Segment | Timeline, None, None]:
    """Read a video and give its segments as soon as they are decided, progress in between, and the timeline at last.

    Memory does not grow with the video. Damage ends nothing: the timeline's ``warning`` says what could not be read.

    Args:
        recognizer: the model.
        source: a path, encoded bytes or a binary file.
        labels: any actions in plain words; None takes the recogniser's own.
        coverage: how often a prediction set should hold the true label, between 0 and 1.
        multi_label: several actions at once: segments may overlap, and where there is none nothing fits.
        fps: frames looked at a second, 0.01 to 60; None takes what the bundle names.

    Raises:
        UsageError: at the call, for bad labels or numbers, or if PyAV is not installed.
        MediaError: at the call if it cannot be opened, later if not one frame can be read.
    """
    choice = choose(recognizer, labels, coverage, multi_label, fps)
    return _stream(recognizer, VideoReader(source), choice)


@dataclass(frozen=True)
class _Look:
    """A frame that was looked at: the model's input if it has to be embedded, and what ``Changes`` says of it."""

    time_s: float
    square: NDArray[np.uint8] | None
    check: bool
    cut: bool


def _stream(
    recognizer: Recognizer, reader: VideoReader, choice: Choice
) -> Generator[Progress | Segment | Timeline, None, None]:
    changes, tracker = Changes(), Tracker(choice)
    segments: list[Segment] = []
    frames = embedded = 0
    vector: NDArray[np.float32] | None = None
    samples = reader.sample(choice.fps)

    def look() -> list[_Look]:
        looks = []
        for time_s, frame in islice(samples, _AHEAD):
            fresh, check, cut = changes.look(frame.luma, time_s)
            looks.append(_Look(time_s, to_input(recognizer, frame) if fresh else None, check, cut))
        return looks

    # the next frames are decoded while the model runs on these
    pool = ThreadPoolExecutor(1, thread_name_prefix="video")
    try:
        ahead, checks = pool.submit(look), list[tuple[NDArray[np.float32], NDArray[np.float32]]]()
        while True:
            batch = ahead.result()
            for old, new in checks:  # here, where no look is under way: the same video always gets the same answer
                changes.checked(old, new)
            if not batch:
                break
            ahead, checks = pool.submit(look), []
            vectors = iter(_embed(recognizer, [one.square for one in batch if one.square is not None]))
            for one in batch:
                if one.square is not None:
                    new = next(vectors)
                    if one.check and vector is not None:
                        checks.append((vector, new))
                    vector, embedded = new, embedded + 1
                assert vector is not None  # noqa: S101 - the first frame is always fresh
                frames += 1
                for segment in tracker.push(one.time_s, vector, one.cut):
                    segments.append(segment)
                    yield segment
            yield Progress(batch[-1].time_s, reader.info.duration_s)
        for segment in tracker.flush(reader.end_s):
            segments.append(segment)
            yield segment
        ordered = tuple(sorted(segments, key=lambda segment: (segment.start_s, segment.end_s)))
        yield Timeline(reader.end_s, ordered, frames, embedded, changes.worst, reader.warning)
    finally:
        # after the look that may be under way, and without waiting: the garbage collector may bring us here
        with suppress(RuntimeError):  # at the interpreter's end, where there is nothing left to close for
            pool.submit(reader.close)
        pool.shutdown(wait=False)


def _embed(recognizer: Recognizer, squares: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
    for at in range(0, len(squares), recognizer.batch_size):
        yield from recognizer.runtime.encode_images(np.stack(squares[at : at + recognizer.batch_size]))


def to_input(recognizer: Recognizer, frame: Frame) -> NDArray[np.uint8]:
    """A frame as the model takes it: uint8 RGB [S,S,3]."""
    spec = recognizer.bundle.info.image
    return to_square(frame.image(min_side=spec.size), spec.size, spec.max_aspect)
