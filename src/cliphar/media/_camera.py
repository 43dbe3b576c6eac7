"""Cameras: on the network or plugged in. Always the newest frame, and connected anew when one is lost."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from cliphar.errors import MediaError
from cliphar.media._video import Frame, error_reason, pixel_aspect, require_av, video_stream

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["Camera", "is_camera"]

_SCHEMES = {"http", "https", "rtmp", "rtmps", "rtsp", "rtsps", "srt", "tcp", "udp"}
_DEVICE = re.compile(r"camera:(\d+)|(/dev/video\d+)")
_PROTOCOLS = "crypto,hls,http,httpproxy,https,rtmp,rtmps,rtp,rtsp,rtsps,srt,srtp,tcp,tls,udp"  # no files of ours
_SILENCE_S = 10.0  # a camera that sends nothing for so long is lost
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0


def is_camera(name: str) -> bool:
    """Whether a name is a camera: an address as ``rtsp://...``, or ``/dev/video0``, or ``camera:0`` for the same."""
    scheme, found, _ = name.partition("://")
    return bool((found and scheme.lower() in _SCHEMES) or _DEVICE.fullmatch(name))


class Camera:
    """A camera's newest frames; a context manager.

    Frames are decoded on a thread as they come, and those that nobody took in time are dropped. A camera that is lost
    is connected to again, after 1, 2, 4 ... at most 30 seconds, for as long as it takes.

    Args:
        address: what ``is_camera`` accepts. Over RTSP the frames come by TCP.
        tell: called, from the thread, with a line when the camera is lost and when it is back.

    Raises:
        MediaError: it cannot be reached at first, or is no camera.
        UsageError: PyAV is not installed.
    """

    def __init__(self, address: str, tell: Callable[[str], None] = lambda _line: None) -> None:
        require_av()
        self._address, self._tell = address, tell
        self.name = _without_password(address)
        # One frame at most. The reader takes no lock of Python's: a Ctrl-C may break off threading.Event and Condition
        # between taking theirs and guarding it, and the next to use them waits for ever.
        self._newest: queue.SimpleQueue[tuple[float, Frame]] = queue.SimpleQueue()
        self._closed = threading.Event()
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        # a daemon, as neither the way to a camera nor a read from it can be broken off
        self._thread = threading.Thread(target=self._run, args=(done,), name="camera", daemon=True)
        self._thread.start()
        try:
            if error := done.get():
                raise error
        except BaseException:
            self._closed.set()
            raise

    def __enter__(self) -> Camera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(1)

    def frames(self, fps: float) -> Iterator[tuple[float, Frame]]:
        """The newest frame and when it came, in seconds by ``time.monotonic``, at most ``fps`` times a second."""
        while not self._closed.is_set():
            try:
                newest = self._newest.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise MediaError(f"{self.name} can no longer be read") from None
                continue
            began = time.monotonic()
            yield newest
            time.sleep(max(0.0, began + 1 / fps - time.monotonic()))

    def _run(self, done: queue.SimpleQueue[Exception | None]) -> None:
        try:
            container, stream = self._open()
        except Exception as error:
            done.put(error)
            return
        done.put(None)
        while not self._closed.is_set():
            with container:
                reason = self._read(container, stream)
            wait_s = _FIRST_WAIT_S
            if not self._closed.is_set():
                self._tell(f"{self.name} was lost ({reason}); trying again until it is back")
            while not self._closed.wait(wait_s):
                try:
                    container, stream = self._open()
                except MediaError:
                    wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                    continue
                self._tell(f"{self.name} is back")
                break

    def _read(self, container: InputContainer, stream: VideoStream) -> str:
        """Take frames until the camera is lost, or this one is closed; why."""
        import av

        aspect = pixel_aspect(stream)
        began = decoded = time.monotonic()
        # what comes before the first key frame is grey; H.264's decoder waits for that, and needs none to start from
        whole = stream.codec_context.name == "h264"
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:  # what a lost packet leaves behind, or before the first key frame
                    if time.monotonic() > decoded + _SILENCE_S:
                        return "what it sends cannot be decoded"
                    continue
                for frame in frames:
                    decoded = time.monotonic()
                    whole = whole or frame.key_frame or decoded > began + _SILENCE_S
                    if not whole:
                        continue
                    with suppress(queue.Empty):
                        self._newest.get_nowait()
                    self._newest.put((decoded, Frame(frame, aspect)))
                if self._closed.is_set():
                    return "closed"
        except av.error.FFmpegError as error:
            return _reason(error)
        return "it stopped sending"

    def _open(self) -> tuple[InputContainer, VideoStream]:
        import av

        device = _DEVICE.fullmatch(self._address)
        where, form, options = self._address, None, {"protocol_whitelist": _PROTOCOLS}
        if device:
            where, form, options = device[2] or f"/dev/video{device[1]}", "v4l2", {}
        else:
            scheme, _, rest = where.partition("://")
            where = f"{scheme.lower()}://{rest}"  # ffmpeg knows no RTSP://
        if where.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        try:
            container = av.open(where, "r", format=form, options=options, timeout=_SILENCE_S)
        except PermissionError as error:
            raise MediaError(f"{self.name} cannot be opened: permission denied; join the group 'video'") from error
        except av.error.ProtocolNotFoundError as error:  # the usual PyAV has no SRT
            raise MediaError(f"{self.name} cannot be reached: PyAV lacks this protocol; send by RTSP") from error
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{self.name} cannot be reached: {_reason(error)}; check it and its address") from error
        try:
            stream = video_stream(container, self.name)
            if container.duration:
                raise MediaError(f"{self.name} is a recording, not a camera; download it and give its path")
            # threads that work on a frame each would keep as many frames back
            stream.thread_type = "SLICE"
        except BaseException:
            container.close()
            raise
        return container, stream


def _reason(error: Exception) -> str:
    told = error_reason(error)  # ffmpeg's word for the end of our patience is that somebody wants to exit
    return f"it sent nothing for {_SILENCE_S:g} s" if told == "Immediate exit requested" else told


def _without_password(address: str) -> str:
    """The address as it may be shown: without the user and password in it, and without values of its query. Passwords
    hold any signs, so no parser of addresses is asked."""
    return re.sub(r"(?<==)[^&#]+", "...", re.sub(r"(?<=://).*@", "", address))
