"""Cameras that are real senders: MJPEG over HTTP, RTSP, and what happens when they come and go."""

from __future__ import annotations

import io
import itertools
import json
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")

from cliphar.errors import MediaError, UsageError  # noqa: E402
from cliphar.media import Camera, is_camera  # noqa: E402
from cliphar.recognizer import Recognizer  # noqa: E402
from cliphar.timeline import Live  # noqa: E402
from serving_process import bounded, free_port  # noqa: E402

RED, BLUE = (220, 20, 20), (20, 20, 220)
FRAMES = [np.full((48, 64, 3), colour, np.uint8) for colour in (RED, BLUE)]


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@contextmanager
def http_camera(port: int, *pictures: bytes) -> Iterator[None]:
    """A camera as many are: a JPEG after the other, twenty a second, over and over."""
    gone = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with suppress(OSError):
                for picture in itertools.cycle(pictures):
                    if gone.wait(0.05):
                        break
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    self.wfile.write(head.encode() + picture + b"\r\n")

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            gone.set()
            server.shutdown()


def colour_of(camera: Camera, wanted: int, limit_s: float = 60) -> bool:
    """Whether a frame comes in which that channel is the strongest."""
    until = time.monotonic() + limit_s
    for _, frame in camera.frames(20):
        if int(np.argmax(np.asarray(frame.image())[60, 80])) == wanted:
            return True
        if time.monotonic() > until:
            break
    return False


def test_names() -> None:
    cameras = ("rtsp://cam/1", "RTSP://user:pw@cam", "http://cam/mjpeg", "udp://0.0.0.0:9", "/dev/video0", "camera:1")
    assert all(is_camera(name) for name in cameras)
    assert not any(is_camera(name) for name in ("clip.mp4", "file:///etc/passwd", "/dev/video", "camera:x", "rtsp:a"))


def test_a_camera_that_was_lost_is_found_again() -> None:
    port, told = free_port(), list[str]()
    with http_camera(port, jpeg(RED)):
        camera = Camera(f"HTTP://me:secret@127.0.0.1:{port}/", told.append)
        assert colour_of(camera, 0)
    with camera:
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
        with http_camera(port, jpeg(BLUE)):
            assert colour_of(camera, 2)
    assert "lost" in told[0]
    assert "back" in told[1]
    assert not any("secret" in line for line in told)


def test_old_frames_are_dropped() -> None:
    port = free_port()
    pictures = [jpeg((8 * k, 8 * k, 8 * k)) for k in range(32)]  # a frame's brightness is its number
    with http_camera(port, *pictures), Camera(f"http://127.0.0.1:{port}/") as camera:
        until, before, skipped = time.monotonic() + 60, None, 0
        for _, frame in camera.frames(60):
            number = round(int(np.asarray(frame.image())[60, 80, 0]) / 8)
            if before is not None:
                skipped = (number - before) % 32 - 1
            if skipped > 0 or time.monotonic() > until:
                break
            before = number
            time.sleep(0.4)  # several come meanwhile
    assert skipped > 0


def test_a_camera_that_was_away_says_nothing_of_that_time(fake: Recognizer) -> None:
    live, (red, _) = Live(fake), FRAMES
    assert [live.push(red, at).since_s for at in (7, 8, 3600, 3601)] == [0, 0, 3593, 3593]
    assert [(segment.start_s, segment.end_s) for segment in live.close()] == [(3593, 3594)]


def test_a_clock_that_begins_anew_stops_nothing(fake: Recognizer) -> None:
    live, (red, blue) = Live(fake), FRAMES
    assert [live.push(red, at).time_s for at in (7, 8, 7.5, 9)] == [0, 1, 1, 2]
    assert [live.push(blue, at).time_s for at in range(9)] == [*range(2, 11)]
    assert live.push(blue, 9).prediction.label == "blue"


def test_another_model_ends_what_the_one_before_it_saw(fake: Recognizer) -> None:
    live, (red, _) = Live(fake), FRAMES
    live.change_model(fake)  # before any frame
    for at in (7, 8, 9):
        assert not live.push(red, at).closed
    with pytest.raises(UsageError):
        live.change_model(fake, [])
    live.change_model(fake)
    answer = live.push(red, 10)
    assert [(one.start_s, one.end_s, one.label) for one in answer.closed] == [(0, 2, "red")]
    assert (answer.time_s, answer.since_s) == (3, 3)
    assert [(one.start_s, one.end_s) for one in (*live.push(red, 11).closed, *live.close())] == [(3, 4)]


def test_what_is_no_camera_is_one_line() -> None:
    nobody = free_port()
    for bad in (
        f"http://127.0.0.1:{nobody}/",
        f"rtsp://me:secret@127.0.0.1:{nobody}/",
        f"rtsp://me:a[#/?secret@127.0.0.1:{nobody}/",
        f"http://127.0.0.1:{nobody}/video?user=me&pwd=secret",
        "/dev/video77",
    ):
        with pytest.raises(MediaError, match="cannot be reached") as caught:
            Camera(bad)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_silent_camera_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliphar.media._camera._SILENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(MediaError, match=r"it sent nothing for 0\.5"):
        Camera(f"http://127.0.0.1:{mute.getsockname()[1]}/")


@pytest.mark.skipif(not Path("/dev/video0").exists(), reason="needs a camera at /dev/video0")
def test_a_device() -> None:
    with Camera("camera:0") as camera:
        _, frame = next(camera.frames(4))
        assert frame.image().width > 0


# --- RTSP


def transport_stream(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.gop_size = 300
        for k in range(600):
            frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), colour, np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


class _Rtsp(socketserver.StreamRequestHandler):
    """RFC 2326 as far as a player asks: MPEG-TS in RTP (RFC 2250), interleaved on the same connection."""

    content = b""

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, number = line.split()[0].decode(), "0"
            while (header := self.rfile.readline().strip()) != b"":
                if header.lower().startswith(b"cseq"):
                    number = header.split(b":")[1].decode().strip()
            extra, body = "", ""
            if method == "OPTIONS":
                extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            elif method == "DESCRIBE":
                body = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=t\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:0\r\n"
                extra = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
            elif method == "SETUP":
                extra = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
            self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{extra}\r\n{body}".encode())
            if method == "PLAY":
                with suppress(OSError):
                    self.play()
                return

    def play(self) -> None:
        size = 7 * 188
        for number, at in enumerate(range(0, len(self.content), size)):
            head = b"\x80\x21" + number.to_bytes(2, "big") + (number * 900).to_bytes(4, "big") + b"\0\0\0\1"
            packet = head + self.content[at : at + size]
            self.wfile.write(b"$\0" + len(packet).to_bytes(2, "big") + packet)
            time.sleep(0.005)


def test_a_ctrl_c_at_any_moment_leaves_it_closable() -> None:
    """The interrupt is raised in the reader at its first step, at its second, and so on until it has two frames."""
    port = free_port()

    def read(camera: Camera, step: int, steps: list[int]) -> None:
        def trace(frame: FrameType, _event: str, _value: object) -> Any:
            steps[0] += 1
            if steps[0] == step:
                raise KeyboardInterrupt
            return trace

        frames, before = camera.frames(1000), sys.gettrace()
        with camera:
            sys.settrace(trace)
            try:
                next(frames), next(frames)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)

    with http_camera(port, jpeg(RED)):
        for step in itertools.count(1):
            steps = [0]
            reader = threading.Thread(target=read, args=(Camera(f"http://127.0.0.1:{port}/"), step, steps), daemon=True)
            reader.start()
            reader.join(60)
            assert not reader.is_alive(), f"interrupted at step {step}, it is never closed"
            if steps[0] < step:
                break
    assert step > 5


def test_rtsp() -> None:
    content = transport_stream(BLUE)[188 * 900 :]  # before the last key frame
    handler = type("Handler", (_Rtsp,), {"content": content})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with Camera(f"rtsp://127.0.0.1:{server.server_address[1]}/live") as camera:
                assert colour_of(camera, 2, limit_s=0)
        finally:
            server.shutdown()


# --- the command


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_what_changes_until_it_is_stopped(
    clean_env: dict[str, str], photos: list[Path], stop: signal.Signals
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "cliphar", "video", f"http://u:secret@127.0.0.1:{port}/", "--json"]
    with http_camera(port, photos[0].read_bytes()):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env)
        with process:
            try:
                assert process.stdout is not None
                with bounded(process):
                    first = json.loads(process.stdout.readline())
                process.send_signal(stop)
                rest, errors = process.communicate(timeout=60)
            finally:
                process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert {"path", "at", "label", "score", "set", "since_s", "closed"} <= set(first)
    last = json.loads(rest.splitlines()[-1])
    assert last["path"] == first["path"] == f"http://127.0.0.1:{port}/"
    assert isinstance(last["closed"], list)


def test_a_camera_is_watched_alone(clean_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cliphar", "video", "rtsp://127.0.0.1:1/", "clip.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env, timeout=120, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
