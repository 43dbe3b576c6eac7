"""A clip as a fixed number of frames, spread evenly over it."""

from __future__ import annotations

from PIL import Image

from cliphar.errors import MediaError
from cliphar.media import VideoReader

__all__ = ["clip_frames"]


def clip_frames(content: bytes, count: int, min_side: int = 0) -> tuple[list[Image.Image], float]:
    """``count`` RGB frames of an encoded clip, what is seen in the middles of as many equal parts; its seconds.

    ``min_side`` above 0 allows them smaller, down to that short side.

    Raises:
        MediaError: not a video, or damaged.
        UsageError: PyAV is not installed.
    """
    with VideoReader(content) as reader:
        duration_s = reader.info.duration_s or _length(content)
        # twice as many as are asked for: every other one is a middle
        samples = list(reader.sample(2 * count / duration_s))
        if reader.warning:
            raise MediaError(f"the clip is not whole: {reader.warning}")
    middles = [frame for _, frame in samples[1::2]] or [samples[0][1]]
    # a duration that the file rounds may be a frame off
    return [middles[min(k, len(middles) - 1)].image(min_side) for k in range(count)], duration_s


def _length(content: bytes) -> float:
    with VideoReader(content) as reader:
        for _ in reader.frames():
            pass
        return reader.end_s
