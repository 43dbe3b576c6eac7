"""A clip as a fixed number of frames, spread evenly over it, and what a model sees in those."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.errors import MediaError
from cliphar.media import ImageLike, VideoLike, VideoReader
from cliphar.recognizer import Recognizer, mean_direction

__all__ = ["clip_frames", "embed_clips"]


def clip_frames(clip: VideoLike, count: int, min_side: int = 0) -> tuple[list[Image.Image], float]:
    """``count`` RGB frames of a clip, what is seen in the middles of as many equal parts; its seconds.

    ``min_side`` above 0 allows them smaller, down to that short side.

    Raises:
        MediaError: not a video, or damaged.
        UsageError: PyAV is not installed.
    """
    with VideoReader(clip) as reader:
        duration_s = (reader.info.duration_s or _length(clip)) - reader.start_s
        # twice as many as are asked for: every other one is a middle
        samples = list(reader.sample(2 * count / duration_s))
        if reader.warning:
            raise MediaError(f"{reader.name} is not whole: {reader.warning}")
    middles = [frame for _, frame in samples[1::2]] or [samples[0][1]]
    # a duration that the file rounds may be a frame off
    return [middles[min(k, len(middles) - 1)].image(min_side) for k in range(count)], duration_s


def _length(clip: VideoLike) -> float:
    with VideoReader(clip) as reader:
        for _ in reader.frames():
            pass
        return reader.end_s


def embed_clips(
    recognizer: Recognizer, clips: Iterable[Sequence[ImageLike] | MediaError]
) -> Iterator[NDArray[np.float32] | MediaError]:
    """What a model sees in each clip as a whole: the direction of its frames' mean, float32 [D], in order.

    A photo is a clip of one frame. Where a MediaError stands instead of a clip, or a frame cannot be read, it is given.
    """
    counts: deque[int] = deque()

    def frames() -> Iterator[ImageLike | MediaError]:
        for clip in clips:
            views = [clip] if isinstance(clip, MediaError) else clip
            counts.append(len(views))
            yield from views

    embedded = recognizer.embed_images(frames())
    for first in embedded:
        found = [first, *(next(embedded) for _ in range(counts.popleft() - 1))]
        vectors = [one for one in found if not isinstance(one, MediaError)]
        errors = [one for one in found if isinstance(one, MediaError)]
        yield errors[0] if errors else mean_direction(np.stack(vectors))
