"""Decode video: any container and codec that ffmpeg reads, sampled on an even grid of times."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.errors import MediaError, UsageError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = [
    "VIDEO_SUFFIXES",
    "Frame",
    "VideoInfo",
    "VideoLike",
    "VideoReader",
    "error_reason",
    "is_video_name",
    "pixel_aspect",
    "require_av",
    "video_stream",
]

VideoLike: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".webm", ".wmv", ".y4m"}
)
MAX_SIDE = 16_384
_LUMA = (32, 32)  # width, height of the thumbnail that changes are measured on
# formats that name other files or addresses: a clip from a stranger must not make us open those
_PLAYLISTS = {"concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "tty", "webm_dash_manifest"}
_LONGEST_STILL_S = 300.0  # a longer one is a clock that jumped, as where recordings are joined
_NOTICED_S = 0.1  # a picture that is less late than that begins with the sound
_WORTH = 4  # frames not decoded that are worth a jump
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def is_video_name(name: str) -> bool:
    """Whether a file's name has the suffix of a usual video format; others are read too when named."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES  # noqa: PTH122 - as is_image_name


def require_av() -> None:
    """UsageError, with the command that mends it, unless PyAV is installed."""
    # av.logging is left alone: at any level ffmpeg's threads wait for Python to log, while Python may wait for them
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UsageError("video needs PyAV; run: pip install 'cliphar[video]'") from error


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself: ``duration_s`` and ``fps`` are None where it does not say."""

    width: int
    height: int
    duration_s: float | None
    fps: float | None


class Frame:
    """A decoded frame. Nothing is converted before it is asked for, and then only at the size asked for."""

    def __init__(self, raw: av.VideoFrame, pixel_aspect: float = 1.0) -> None:
        self._raw = raw
        self._pixel_aspect = pixel_aspect

    @cached_property
    def luma(self) -> NDArray[np.uint8]:
        """The brightness of the whole frame as it lies in the file, averaged down to uint8 [32,32]."""
        small = self._raw.reformat(*_LUMA, format="gray", interpolation="AREA")
        return np.asarray(small.to_ndarray(), np.uint8)

    def image(self, min_side: int = 0) -> Image.Image:
        """Upright RGB with square pixels; with ``min_side`` above 0 it may be smaller, down to that short side."""
        width, height = max(1, round(self._raw.width * self._pixel_aspect)), self._raw.height
        way = "BICUBIC"
        if min_side:
            scale = min(1.0, min_side / min(width, height))
            way = "AREA" if scale <= 0.5 else way  # as good where much is averaged, in half the time
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        rgb = self._raw.reformat(width, height, format="rgb24", interpolation=way).to_ndarray()
        image = Image.fromarray(rgb)
        turn = _TURNS.get(round(self._raw.rotation / 90) * 90 % 360)
        return image if turn is None else image.transpose(turn)


class VideoReader:
    """Reads a video; a context manager.

    Times are seconds from where players count: the file's first sound or picture. ``start_s`` is the picture's.
    Damage does not raise once a frame was read: what can be read is given, and ``problems`` says what could not.

    Args:
        source: a path, encoded bytes or a binary file. Playlists, which name other files, are refused.

    Raises:
        MediaError: it cannot be opened, or there is no picture in it.
        UsageError: PyAV is not installed.
    """

    def __init__(self, source: VideoLike) -> None:
        require_av()
        self.name = _name(source)
        self.problems: list[str] = []
        self.end_s = 0.0
        self._closed = False
        self._container = _open(source, self.name)
        try:
            self._stream = video_stream(self._container, self.name)
            self._start = self._stream.start_time  # as it is read on, ffmpeg may come to another one
            self.start_s = self._lateness()
            self.info = self._read_info()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; MediaError if frames are asked for after."""
        self._closed = True
        self._container.close()

    def _check_open(self) -> None:
        if self._closed:  # ffmpeg would bring the process down
            raise MediaError(f"{self.name} is closed; read its frames before")

    @property
    def warning(self) -> str | None:
        """The problems met so far in one line, or None."""
        return "; ".join(self.problems) or None

    def _lateness(self) -> float:
        """Seconds from the file's beginning to the picture's; where they are many, ``_start`` is the file's."""
        began, unit = self._container.start_time, self._stream.time_base
        if self._start is None or began is None or not unit:
            return 0.0
        late_s = float(self._start * unit) - began / 1_000_000
        if not _NOTICED_S < late_s < _LONGEST_STILL_S:
            return 0.0
        self._start -= round(late_s / unit)
        return late_s

    def _read_info(self) -> VideoInfo:
        stream, container = self._stream, self._container
        width, height = stream.codec_context.width, stream.codec_context.height
        if max(width, height) > MAX_SIDE:
            raise MediaError(f"{self.name} is too large: {width:,} x {height:,}; sides up to {MAX_SIDE:,} are read")
        duration = None
        if stream.duration and stream.time_base:
            duration = self.start_s + float(stream.duration * stream.time_base)
        elif container.duration:
            duration = container.duration / 1_000_000
            if "matroska" in container.format.name:
                # that of the picture, which the sound may outlast, is a tag, where there is one
                told = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
                if told:
                    duration = min(duration, 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3]))
                # counts from zero, where a part of a recording may begin late
                duration = max(0.0, duration - float((self._start or 0) * (stream.time_base or 0))) or None
        rate = stream.average_rate or stream.guessed_rate
        return VideoInfo(width, height, duration, float(rate) if rate else None)

    def frames(self) -> Iterator[tuple[float, Frame]]:
        """Every frame with its time, ascending; MediaError if there is none."""
        yield from self._decode(None)

    def sample(self, fps: float) -> Iterator[tuple[float, Frame]]:
        """The frame that is seen at 0, 1/fps, 2/fps ... seconds after ``start_s``, whatever the video's own rate.

        Frames that no other is predicted from are not decoded if the video has at least three times as many frames as
        are asked for, and groups of frames of which the file's index says that none is needed are jumped over.

        Raises:
            MediaError: not one frame can be read.
        """
        step = 1 / fps
        first = number = self.start_s * fps
        shown: Frame | None = None
        for time_s, frame in self._decode(fps):
            # up to where this frame begins, the one before is seen; the first is seen from the start
            while shown is not None and number * step < time_s - 1e-6:
                yield number * step, shown
                number += 1
                self._wanted_s = number * step
            shown = frame
        while shown is not None and (number == first or number * step < self.end_s - 1e-6):
            yield number * step, shown
            number += 1

    def _decode(self, fps: float | None) -> Iterator[tuple[float, Frame]]:
        self._check_open()
        stream, context = self._stream, self._stream.codec_context
        stream.thread_type = "AUTO"
        sparse = fps is not None and self.info.fps is not None and self.info.fps >= 3 * fps
        sparse = sparse and self._start is not None  # frames without times are counted, so all are needed
        context.skip_frame = "NONREF" if sparse else "DEFAULT"
        frame_s = 1 / self.info.fps if self.info.fps else 0.04
        aspect = pixel_aspect(stream)
        self._wanted_s, self._jumped = 0.0, False
        self._last_s, self._shift_s, self._seen, self._anew = 0.0, 0.0, 0, False
        for raw in self._raw_frames(jump=fps is not None):
            time_s = self._time(raw, frame_s)
            if time_s is None:
                continue
            if sparse and fps and self._seen and time_s - self._last_s > 1 / fps:  # too few are left: take them all
                context.skip_frame = "DEFAULT"
            if raw.is_corrupt:
                self._skipped(time_s, None)
            self._last_s, self._seen = time_s, self._seen + 1
            held_s = float((raw.duration or 0) * (raw.time_base or 0))  # 0 where the file does not say
            self.end_s = time_s + (min(held_s, _LONGEST_STILL_S) or frame_s)
            yield time_s, Frame(raw, aspect)
            self._check_open()
        self._check_end()

    def _raw_frames(self, jump: bool) -> Iterator[av.VideoFrame]:
        """All that can be decoded; ``_anew`` once the packets' clock has gone back."""
        import av

        before = -(2**62)
        for packet in self._packets(jump):
            if packet.is_corrupt:
                self._skipped(self._last_s, None)
                packet.pts = None  # it may have been read from the damage
            elif packet.dts is not None and packet.time_base:
                self._anew, before = self._anew or packet.dts < before - 1 / packet.time_base, packet.dts
            try:
                decoded = packet.decode()
            except av.error.FFmpegError as error:
                self._skipped(self._last_s, error)
                continue
            yield from (raw for raw in decoded if isinstance(raw, av.VideoFrame))

    def _time(self, raw: av.VideoFrame, frame_s: float) -> float | None:
        """A frame's time, no earlier than the last one's; None if it is to be left out."""
        last = self._last_s
        if raw.pts is None or raw.time_base is None:
            time_s = last + frame_s if self.end_s else 0.0
        else:
            if self._start is None:
                self._start = raw.pts
            time_s = float((raw.pts - self._start) * raw.time_base)
        time_s += self._shift_s
        if self._jumped and time_s <= last:  # a jump may land a little before where it was aimed
            return None
        if not self._jumped and time_s > last + frame_s + _LONGEST_STILL_S:
            self.problems.append(f"its clock jumps from {last:.1f} s to {time_s:.1f} s; the gap was left out")
            self._shift_s -= time_s - last - frame_s
            time_s = last + frame_s
        self._jumped = False
        if self._seen and time_s < last - 1:
            if not self._anew:  # a frame that damage held back
                return None
            self._anew = False  # clips joined end to end start their clocks anew
            self._shift_s += last + frame_s - time_s
            time_s = last + frame_s
        return max(time_s, last)

    def _check_end(self) -> None:
        if not self._seen:
            if Path(self.name).is_fifo():  # such as an MP4 with its index at the end
                raise MediaError(
                    f"{self.name} is a pipe, and this video cannot be read from one; save it to a file first"
                )
            reason = self.problems[0] if self.problems else "no picture can be decoded"
            raise MediaError(f"{self.name} is damaged: {reason}")
        declared = self.info.duration_s
        if declared and self.end_s + 1 + 0.05 * declared < declared:
            self.problems.append(f"stops at {self.end_s:.1f} s of {declared:.1f} s: cut short or damaged")

    def _packets(self, jump: bool) -> Iterator[av.Packet[Any]]:
        import av

        stream, unit = self._stream, self._stream.time_base
        index = stream.index_entries if jump and unit and self._container.duration else None
        position, delay, failures = -(2**62), 0, 0
        while True:
            try:
                for packet in self._container.demux(stream):
                    failures = 0
                    yield packet
                    if packet.dts is None or not index or not unit:
                        continue
                    position = max(position, packet.dts)
                    if packet.pts is not None:  # some indexes say when a frame is decoded: it is seen so much later
                        delay = max(delay, packet.pts - packet.dts)
                    wanted = int(self._wanted_s / unit) + (self._start or 0) - delay
                    key = index[max(0, index.search_timestamp(wanted))].timestamp  # the last key frame before it
                    if key > position + _WORTH * (packet.duration or 1):
                        self._container.seek(key, stream=stream)
                        position, self._jumped = key, True
                return
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                failures += 1
                self._skipped(self.end_s, error)
                if failures >= 5:
                    return

    def _skipped(self, time_s: float, error: Exception | None) -> None:
        reason = f" ({error_reason(error)})" if error else ""
        if not any(problem.startswith("damaged") for problem in self.problems):
            self.problems.append(f"damaged at {time_s:.1f} s{reason}; what could be read was used")


def _name(source: VideoLike) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the video"


def error_reason(error: Exception) -> str:
    """ffmpeg's words for an error, one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _open(source: VideoLike, name: str) -> InputContainer:
    import av

    allowed = ",".join(sorted(name for name in av.formats_available if not _PLAYLISTS & set(name.split(","))))
    options = {"format_whitelist": allowed, "protocol_whitelist": "file"}
    try:
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if not path.exists():
                raise MediaError(f"{path} does not exist")
            if path.is_file() and path.stat().st_size == 0:
                raise MediaError(f"{path} is empty (0 bytes)")
            # a name such as "concat:a|b" or "http:x" is a file's name here, never a protocol
            opened: Any = f"file:{path}"
        elif isinstance(source, bytes):
            opened = io.BytesIO(source)
        elif hasattr(source, "read"):
            opened = source
        else:
            raise MediaError(f"cannot take {type(source).__name__} as a video; give one path, bytes or open file")
        container: InputContainer = av.open(opened, "r", metadata_errors="replace", options=options)
        return container
    except IsADirectoryError as error:
        raise MediaError(f"{name} is a directory, not a video") from error
    except PermissionError as error:
        raise MediaError(f"{name} cannot be read: permission denied") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{name} is not a video that can be read: {error_reason(error)}") from error


def video_stream(container: InputContainer, name: str) -> VideoStream:
    """The moving picture in a container; MediaError if there is none."""
    from av.stream import Disposition

    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise MediaError(f"{name} is a photo, not a video; run 'cliphar predict' on it")
    # the picture on the sleeve of a song is a video stream too, of one frame
    pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not pictures:
        raise MediaError(f"{name} has no picture in it; give a file with a video stream")
    if pictures[0].codec_context is None:
        raise MediaError(f"{name} cannot be decoded: its codec is unknown here; convert it, to H.264 for one")
    return pictures[0]


def pixel_aspect(stream: VideoStream) -> float:
    """The width of a pixel over its height; where the file says what no lens makes, it is damaged: 1."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / 4 <= aspect <= 4 else 1.0
