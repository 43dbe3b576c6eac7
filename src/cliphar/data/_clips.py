"""A clip as a fixed number of frames, spread evenly over it."""

from __future__ import annotations

import io

from PIL import Image

from cliphar.errors import MediaError, UsageError

__all__ = ["clip_frames"]


def clip_frames(content: bytes, count: int) -> list[Image.Image]:
    """``count`` RGB frames of an encoded clip: the middles of as many equal parts; a shorter clip repeats some.

    Raises:
        MediaError: not a video, damaged, or without a frame.
        UsageError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("clips need PyAV; run: pip install 'cliphar[video]'") from error
    kept: dict[int, Image.Image] = {}
    try:
        # twice: the number of frames that a file claims is often wrong or absent
        with av.open(io.BytesIO(content), "r") as file:
            total = sum(1 for _ in file.decode(video=0))
        wanted = [int((k + 0.5) * total / count) for k in range(count)]
        with av.open(io.BytesIO(content), "r") as file:
            for number, frame in enumerate(file.decode(video=0)):
                if number in wanted:
                    kept[number] = Image.fromarray(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise MediaError(f"the clip cannot be read: {error}") from error
    if not total:
        raise MediaError("the clip has no frames")
    return [kept[number] for number in wanted]
