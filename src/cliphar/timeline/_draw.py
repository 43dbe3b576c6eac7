"""Segments as pictures: an annotated MP4 and a contact sheet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cliphar.bundle import whole_file
from cliphar.errors import MediaError
from cliphar.labels import UNKNOWN, with_score
from cliphar.media import Frame, VideoLike, VideoReader
from cliphar.timeline._types import Segment

__all__ = ["annotate", "colours", "contact_sheet"]

# Okabe and Ito's colours, which people tell apart whatever their colour vision
_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
_GREY = "#999999"
_MAX_TILES = 48
_TILE = (256, 144)


def contact_sheet(source: VideoLike, segments: Sequence[Segment]) -> Image.Image:
    """One picture with the middle frame of each segment, its times and its label; of many segments the 48 longest.

    Raises:
        MediaError: the video cannot be read.
        UsageError: PyAV is not installed.
    """
    longest = sorted(segments, key=lambda segment: segment.start_s - segment.end_s)[:_MAX_TILES]
    shown = sorted(longest, key=lambda segment: segment.start_s)
    tiles = _middles(source, shown)
    width, height = _TILE
    columns = max(1, min(4, len(shown)))
    line, margin = 34, 8
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + line + margin) + margin), "#111111")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    colour = colours(segments)
    for at, (segment, tile) in enumerate(zip(shown, tiles, strict=True)):
        left = margin + at % columns * (width + margin)
        top = margin + at // columns * (height + line + margin)
        if tile is not None:
            sheet.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
        draw.rectangle((left, top + height, left + 5, top + height + line - 4), fill=colour[segment.label])
        draw.text((left + 11, top + height), with_score(segment.label[:36], segment.score), fill="white", font=font)
        times = f"{segment.start_s:.1f} to {segment.end_s:.1f} s"
        draw.text((left + 11, top + height + 15), times, fill="#bbbbbb", font=font)
    return sheet


def _middles(source: VideoLike, segments: Sequence[Segment]) -> list[Image.Image | None]:
    wanted = sorted((((one.start_s + one.end_s) / 2, at) for at, one in enumerate(segments)), reverse=True)
    tiles: list[Image.Image | None] = [None] * len(segments)
    before: Frame | None = None

    def keep(at: int, frame: Frame) -> None:
        tile = frame.image(min_side=_TILE[1])
        tile.thumbnail(_TILE)
        tiles[at] = tile

    with VideoReader(source) as reader:
        for time_s, frame in reader.frames():
            while wanted and wanted[-1][0] < time_s:
                keep(wanted.pop()[1], before or frame)
            if not wanted:
                break
            before = frame
        for _, at in wanted:
            if before is not None:
                keep(at, before)
    return tiles


def annotate(source: VideoLike, segments: Sequence[Segment], target: str | os.PathLike[str]) -> None:
    """Write the video anew as an MP4 (H.264, no sound) with its labels and a bar of the whole timeline drawn on it.

    The file appears whole or not at all.

    Raises:
        MediaError: the video cannot be read.
        UsageError: PyAV is not installed.
    """
    reader = VideoReader(source)  # before the import: it says what to do if PyAV is not installed
    import av

    path = Path(target)
    try:
        with reader, whole_file(path) as partial, av.open(partial, "w", format="mp4") as out:
            rate = Fraction(max(25, reader.info.fps or 0)).limit_denominator(1001)
            stream = out.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "23"})
            stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 90_000)
            stream.codec_context.time_base = stream.time_base
            overlay: _Overlay | None = None
            last = -1
            for time_s, image in _shown(reader, float(1 / rate)):
                # the first is seen from the start, though sound may come before it
                pts = max(last + 1, round(time_s * 90_000)) if overlay else 0
                if overlay is None:
                    stream.width, stream.height = _even(image)
                    overlay = _Overlay(segments, (stream.width, stream.height), reader.info.duration_s)
                drawn = av.VideoFrame.from_ndarray(overlay.draw(image, pts / 90_000), format="rgb24")
                drawn.pts, drawn.time_base, last = pts, stream.time_base, pts
                out.mux(stream.encode(drawn))
            out.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise MediaError(f"cannot write {path}: {error.strerror}") from error


def _shown(reader: VideoReader, step_s: float) -> Iterator[tuple[float, Image.Image]]:
    """Every frame with its time; the last again and again while it is held, as a writer takes it to last one step."""
    for time_s, frame in reader.frames():
        yield time_s, frame.image()
    for k in range(1, round((reader.end_s - time_s) / step_s)):
        yield time_s + k * step_s, frame.image()


def _even(image: Image.Image) -> tuple[int, int]:
    """Its size as H.264 takes it."""
    return max(2, image.width & ~1), max(2, image.height & ~1)


class _Overlay:
    """Draws on frames of one size."""

    def __init__(self, segments: Sequence[Segment], size: tuple[int, int], duration_s: float | None) -> None:
        self._segments, self._size = segments, size
        self._duration = duration_s or max((segment.end_s for segment in segments), default=1.0)
        self._colours = colours(segments)
        self._bar = max(6, size[1] // 40)
        self._font = ImageFont.load_default(max(12, size[1] // 22))

    def draw(self, image: Image.Image, time_s: float) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """uint8 RGB [H,W,3] of the overlay's size."""
        width, height = self._size
        if image.size != self._size:  # a call's recording changes its size on the way
            image = image.crop((0, 0, width, height)) if _even(image) == self._size else ImageOps.pad(image, self._size)
        draw, top = ImageDraw.Draw(image), height - self._bar
        for segment in self._segments:
            left, right = (at / self._duration * width for at in (segment.start_s, segment.end_s))
            draw.rectangle((left, top, max(left, right - 1), height), fill=self._colours[segment.label])
        at = min(time_s / self._duration, 1) * width
        draw.rectangle((at - 1, top - 3, at + 1, height), fill="white")
        y = 6.0
        for segment in self._segments:
            if segment.start_s <= time_s < segment.end_s:
                text = with_score(segment.label, segment.score)
                box = draw.textbbox((10, y), text, font=self._font)
                draw.rectangle((4, box[1] - 4, box[2] + 6, box[3] + 4), fill="#000000")
                draw.rectangle((4, box[1] - 4, 7, box[3] + 4), fill=self._colours[segment.label])
                draw.text((10, y), text, fill="white", font=self._font)
                y = box[3] + 10
        return np.asarray(image)


def colours(segments: Sequence[Segment]) -> dict[str, str]:
    """A colour, ``#rrggbb``, for each label of the segments, as the drawings have it."""
    named = cycle(_COLOURS)
    labels = sorted({segment.label for segment in segments})
    return {label: _GREY if label == UNKNOWN else next(named) for label in labels}
