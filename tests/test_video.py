"""Video, with real files made by PyAV: decoding, timelines, what is written, and the command."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cliphar.bundle import BundleInfo, write_bundle
from cliphar.errors import MediaError, UsageError
from cliphar.media import VideoReader
from cliphar.recognizer import Recognizer
from cliphar.timeline import (
    Live,
    Progress,
    Segment,
    Timeline,
    annotate,
    contact_sheet,
    recognize_video,
    stream_video,
    to_csv,
    to_webvtt,
)
from cliphar.timeline._tracker import Tracker, choose

RED, GREEN, BLUE = (220, 20, 20), (20, 220, 20), (20, 20, 220)


def film(
    path: Path,
    colours: Sequence[tuple[int, int, int]],
    *,
    seconds: float = 6.0,
    fps: int | Fraction = 10,
    codec: str = "mpeg4",
    turn: int = 0,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (64, 48),
    held_s: float = 0,
    sound: float = 0,
) -> Path:
    """A video that shows each colour for some seconds, or at the times given; the last for ``held_s``; so many seconds
    of sound."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = Fraction(1)
        each, packets = round(seconds * fps), list[Any]()
        if sound:
            silence = av.AudioFrame("s16", "mono", round(8000 * sound))
            silence.sample_rate = 8000
            packets += out.add_stream("pcm_s16le", rate=8000, layout="mono").encode(silence)
        shown = [colour for colour in colours for _ in range(each)] if times is None else list(colours)
        for at, colour in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), colour, np.uint8), format="rgb24")
            frame.pts = round(1000 * (at / fps if times is None else times[at]))
            frame.time_base = Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if held_s:
            packets[-1].duration = round(1000 * held_s)
        out.mux(packets)
    return path


def sampled(path: Path, fps: float) -> list[tuple[float, int]]:
    """When a frame is seen, and which of red, green and blue it is."""
    with VideoReader(path) as reader:
        return [(time_s, int(np.argmax(np.asarray(frame.image())[5, 5]))) for time_s, frame in reader.sample(fps)]


def labels_of(timeline: Timeline) -> list[str]:
    return [segment.label for segment in timeline.segments]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("mkv", "mjpeg"), ("webm", "libvpx"), ("ts", "libx264")]
)
def test_any_container_becomes_a_timeline(tmp_path: Path, fake: Recognizer, suffix: str, codec: str) -> None:
    path = film(tmp_path / f"clip.{suffix}", [RED, GREEN, BLUE, GREEN], codec=codec, fps=12)
    timeline = recognize_video(fake, path)
    assert labels_of(timeline) == ["red", "green", "blue", "green"]
    assert timeline.warning is None
    assert timeline.duration_s == pytest.approx(24, abs=0.1)
    starts = [segment.start_s for segment in timeline.segments]
    assert starts == pytest.approx([0, 6, 12, 18], abs=0.26)
    for before, after in zip(timeline.segments, timeline.segments[1:], strict=False):
        assert before.end_s == after.start_s
    assert all(segment.label in segment.set for segment in timeline.segments)


def test_bytes_and_open_files_are_read_too(tmp_path: Path, fake: Recognizer) -> None:
    path = film(tmp_path / "clip.mp4", [RED, BLUE])
    expected = recognize_video(fake, path).segments
    assert recognize_video(fake, path.read_bytes()).segments == expected
    with path.open("rb") as file:
        assert recognize_video(fake, file).segments == expected


def test_the_frame_seen_at_each_time_is_sampled(tmp_path: Path) -> None:
    path = film(tmp_path / "slides.mkv", [RED, GREEN, BLUE, BLUE], times=[0, 0.9, 5.1, 6.2], codec="mjpeg")
    seen = sampled(path, 2)
    assert [time_s for time_s, _ in seen] == [k / 2 for k in range(len(seen))]
    assert [colour for _, colour in seen][:11] == [0, 0] + [1] * 9
    assert {colour for _, colour in seen[11:]} == {2}


def test_slow_sampling_jumps_and_finds_the_same_frames(tmp_path: Path) -> None:
    path = film(tmp_path / "long.mp4", [RED, GREEN, BLUE] * 4, seconds=5)
    assert sampled(path, 0.2) == [(5.0 * k, k % 3) for k in range(12)]


def test_a_jump_by_an_index_of_decoding_times_lands_before_what_is_seen(tmp_path: Path) -> None:
    path = film(tmp_path / "long.flv", [RED, GREEN, BLUE] * 20, seconds=1, codec="libx264")
    seen = [colour for _, colour in sampled(path, 1 / 2.9)]
    assert seen == [int(2.9 * k) % 3 for k in range(len(seen))]


def test_a_turned_video_is_set_upright(tmp_path: Path) -> None:
    with VideoReader(film(tmp_path / "turned.mp4", [RED], turn=90)) as reader:
        _, frame = next(reader.frames())
        assert frame.image().size == (48, 64)


@pytest.mark.parametrize(("shape", "width"), [((2, 1), 128), ((65535, 1), 64), ((2**31 - 1, 1), 64), ((1, 9999), 64)])
def test_pixels_that_no_lens_makes_are_square(tmp_path: Path, shape: tuple[int, int], width: int) -> None:
    content = film(tmp_path / "clip.mp4", [RED]).read_bytes()
    box = content.index(b"pasp") + 4
    with VideoReader(content[:box] + struct.pack(">2I", *shape) + content[box + 8 :]) as reader:
        assert next(reader.frames())[1].image().size == (width, 48)


def test_a_closed_reader_refuses_to_read(tmp_path: Path) -> None:
    with VideoReader(film(tmp_path / "clip.mp4", [RED])) as reader:
        begun, unbegun = reader.frames(), reader.sample(1)
        next(begun)
    for frames in (begun, unbegun):
        with pytest.raises(MediaError, match="is closed"):  # and does not end the process
            next(frames)


@pytest.mark.parametrize("suffix", ["avi", "ts", "mkv"])
def test_of_a_file_cut_short_what_is_there_is_answered_and_the_rest_is_said(
    tmp_path: Path, fake: Recognizer, suffix: str
) -> None:
    codec = "mpeg4" if suffix == "ts" else "mjpeg"  # large frames: half of the bytes is half of the time
    path = film(tmp_path / f"whole.{suffix}", [RED, GREEN, BLUE, RED], seconds=4, size=(320, 240), codec=codec)
    whole = path.read_bytes()
    timeline = recognize_video(fake, whole[: len(whole) // 2])
    assert labels_of(timeline)[0] == "red"
    assert 2 < timeline.duration_s < 15
    if suffix == "mkv":  # the others do not say how long they were
        assert timeline.warning is not None


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("ts", "libx264")])
def test_damage_in_the_middle_ends_nothing(tmp_path: Path, fake: Recognizer, suffix: str, codec: str) -> None:
    path = film(tmp_path / f"whole.{suffix}", [RED, GREEN, BLUE, RED], size=(320, 240), codec=codec)
    content = bytearray(path.read_bytes())
    noise = np.random.default_rng(0).bytes(len(content) // 20)
    content[len(content) // 2 : len(content) // 2 + len(noise)] = noise
    timeline = recognize_video(fake, bytes(content))
    assert labels_of(timeline)[0] == "red"
    if codec == "mpeg4":  # x264 puts one whole picture at the start, and what was lost is missed to the end
        assert labels_of(timeline)[-1] == "red"
    assert timeline.duration_s == pytest.approx(24, abs=1)
    assert timeline.warning is not None
    assert "damaged" in timeline.warning


def test_ffmpeg_never_waits_for_python_to_log(tmp_path: Path) -> None:
    with VideoReader(film(tmp_path / "clip.mp4", [RED])):
        assert av.logging.get_level() is None  # else closing a video in the middle may hang


def test_clips_joined_end_to_end_are_one(tmp_path: Path, fake: Recognizer) -> None:
    parts = [film(tmp_path / f"{k}.ts", [colour], codec="mpeg4").read_bytes() for k, colour in enumerate((RED, GREEN))]
    timeline = recognize_video(fake, b"".join(parts))
    assert labels_of(timeline) == ["red", "green"]
    assert timeline.duration_s == pytest.approx(12, abs=0.5)


def test_a_clock_that_jumps_is_told_of_and_the_gap_left_out(tmp_path: Path, fake: Recognizer) -> None:
    times = [k / 10 for k in range(60)] + [1e6 + k / 10 for k in range(60)]
    path = film(tmp_path / "joined.mkv", [RED] * 60 + [GREEN] * 60, times=times)
    timeline = recognize_video(fake, path)
    assert labels_of(timeline) == ["red", "green"]
    assert timeline.segments[-1].end_s == pytest.approx(12, abs=0.3)
    assert "clock jumps from 5.9 s" in str(timeline.warning)


def test_a_clock_that_jumps_before_the_first_picture_is_not_waited_for(tmp_path: Path) -> None:
    content = film(tmp_path / "late.mkv", [RED] * 3, times=[0, 1e6, 1e6 + 1], codec="mjpeg").read_bytes()
    first = content.index(b"\xff\xd8")
    with VideoReader(content[:first] + bytes(600) + content[first + 600 :]) as reader:
        assert sum(1 for _ in reader.sample(0.1)) < 10


def test_frames_without_times_are_counted(tmp_path: Path) -> None:
    with VideoReader(film(tmp_path / "raw.h264", [RED], codec="libx264", fps=25)) as reader:
        assert [time_s for time_s, _ in reader.sample(1)] == [0, 1, 2, 3, 4, 5]
        assert reader.end_s == pytest.approx(6)


@pytest.mark.parametrize(("codec", "times"), [("mjpeg", range(900, 908)), ("libx264", range(0, 80, 10))])
def test_a_part_of_a_recording_and_slow_pictures_are_whole(tmp_path: Path, codec: str, times: range) -> None:
    path = film(tmp_path / "part.mkv", [RED] * 8, codec=codec, fps=Fraction(1, times.step), times=times)
    with VideoReader(path) as reader:
        assert [round(time_s) for time_s, _ in reader.frames()] == [time - times[0] for time in times]
        assert reader.warning is None


@pytest.mark.parametrize("late", [0, 2])
def test_pictures_are_seen_when_said(tmp_path: Path, late: int) -> None:
    path = film(tmp_path / "held.mp4", [RED] * 2, fps=5, times=[late, late + 0.2], held_s=4, sound=1)
    annotate(path, [], copy := tmp_path / "copy.mp4")
    for one, first in ((path, late), (copy, 0)):
        with VideoReader(one) as reader:
            assert [time_s for time_s, _ in reader.sample(1)] == list(range(first, late + 5))
            assert reader.info.duration_s == pytest.approx(late + 4.2, abs=0.05)


def test_without_pyav_a_drawing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "clip.mp4", [RED], seconds=1)
    monkeypatch.setitem(sys.modules, "av", None)
    for draw in (lambda: annotate(path, [], tmp_path / "out.mp4"), lambda: contact_sheet(path, [])):
        with pytest.raises(UsageError, match=r"cliphar\[video\]"):
            draw()


def test_sound_may_outlast_the_picture(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mkv", [RED], seconds=2, sound=9)
    with VideoReader(path) as reader:
        assert len(list(reader.sample(1))) == 2
        assert (reader.info.duration_s, reader.warning) == (2, None)


def test_what_nobody_saw_is_in_no_segment(fake: Recognizer) -> None:
    tracker = Tracker(choose(fake, None, 0.9, False, None))
    red, green, blue = colours = np.eye(3, dtype=np.float32)
    segments = [segment for k in range(40) for segment in tracker.push(k / 4, red, False)]
    for k in range(80):
        segments += tracker.push(3600 + k / 4, green if k < 40 else blue, False)
    segments += tracker.flush(3620)
    times = [(0, 10), (3600, 3609.875), (3609.875, 3620)]  # a change is halfway between two frames
    assert [(s.label, s.start_s, s.end_s) for s in segments] == [
        (n, *t) for n, t in zip(fake.labels, times, strict=True)
    ]
    assert [s.score for s in segments] == pytest.approx([one.score for one in fake.score(colours)])
    slow = Tracker(choose(fake, None, 0.9, False, 0.01))
    assert [slow.push(100 * k, red, False) for k in range(3)] == [[], [], []]


def test_a_cut_begins_anew_what_is_averaged(
    tmp_path: Path, make_info: Callable[..., BundleInfo], head: bytes, fake: Recognizer
) -> None:
    info = make_info(video={"fps": 4, "window_s": 2})
    bundle = write_bundle(tmp_path / "windowed", info, {"head.safetensors": head})
    tracker = Tracker(choose(Recognizer(bundle, fake.runtime), None, 0.9, False, None))
    red, green = np.eye(3, dtype=np.float32)[:2]
    for k in range(8):
        tracker.push(k / 4, red, False)
    tracker.push(2.0, green, True)
    (alone,) = fake.score(green[None])
    assert (tracker.now().top, tracker.now().evidence) == (alone.top, alone.evidence)


def test_a_change_is_where_the_middle_of_the_window_passes_it(
    tmp_path: Path, make_info: Callable[..., BundleInfo], head: bytes, fake: Recognizer
) -> None:
    info = make_info(video={"fps": 4, "window_s": 8})
    bundle = write_bundle(tmp_path / "windowed", info, {"head.safetensors": head})
    red, green = np.eye(3, dtype=np.float32)[:2]
    for fps, count, change, near in ((4, 160, 20, 0.5), (0.2, 8, 2.5, 2)):
        tracker = Tracker(choose(Recognizer(bundle, fake.runtime), None, 0.9, False, fps))
        seen = [red if k / fps < change else green for k in range(count)]
        segments = [one for k in range(count) for one in tracker.push(k / fps, seen[k], False)]
        segments += tracker.flush(40)
        assert [(s.label, s.start_s, s.end_s) for s in segments] == [
            ("red", 0, pytest.approx(change, abs=near)),
            ("green", segments[0].end_s, 40),
        ]


def test_what_is_no_video_is_one_line(tmp_path: Path, photos: list[Path]) -> None:
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    coded = film(tmp_path / "codec.avi", [RED])
    coded.write_bytes(coded.read_bytes().replace(b"FMP4", b"XYZ9"))
    names = ("empty.mp4", "noise.mp4", "none.mp4", "long" * 99, "codec.avi")
    for bad in (playlist, *(tmp_path / name for name in names), tmp_path, photos[0]):
        with pytest.raises(MediaError) as caught:
            VideoReader(bad)
        assert "\n" not in str(caught.value)


def test_what_stands_still_is_not_computed_again(tmp_path: Path, fake: Recognizer) -> None:
    timeline = recognize_video(fake, film(tmp_path / "still.mp4", [RED], seconds=20))
    assert timeline.frames == 80
    assert timeline.embedded <= 8  # it is checked now and then
    assert timeline.reuse_error == pytest.approx(0, abs=1e-4)


def test_a_stream_gives_progress_then_segments_then_the_timeline(tmp_path: Path, fake: Recognizer) -> None:
    path = film(tmp_path / "clip.mp4", [RED, GREEN, BLUE], seconds=8)
    items = list(stream_video(fake, path))
    assert isinstance(items[-1], Timeline)
    assert items[-1].segments == tuple(item for item in items if isinstance(item, Segment))
    first = next(at for at, item in enumerate(items) if isinstance(item, Segment))
    assert any(isinstance(item, Progress) for item in items[first:])  # it did not wait for the end


def test_a_stream_may_be_left_in_the_middle(tmp_path: Path, clean_env: dict[str, str]) -> None:
    path = film(tmp_path / "clip.mp4", [RED] * 4)
    code = f"items = stream_video(load('mini'), {str(path)!r}); next(items)"
    code = f"from cliphar import load\nfrom cliphar.timeline import stream_video\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_env, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_several_actions_at_once_overlap(
    tmp_path: Path, make_info: Callable[..., BundleInfo], head: bytes, fake: Recognizer
) -> None:
    path = film(tmp_path / "clip.mp4", [(200, 200, 0), GREEN], seconds=12)
    timeline = recognize_video(fake, path, multi_label=True)
    assert {"red", "green"} <= set(labels_of(timeline))
    red = next(segment for segment in timeline.segments if segment.label == "red")
    assert red.end_s == pytest.approx(12, abs=0.6)


def test_a_bundle_names_its_rate_and_its_window(
    tmp_path: Path, make_info: Callable[..., BundleInfo], head: bytes, fake: Recognizer
) -> None:
    info = make_info(video={"fps": 2, "window_s": 1.5})
    slow = Recognizer(write_bundle(tmp_path / "slow", info, {"head.safetensors": head}), fake.runtime)
    timeline = recognize_video(slow, film(tmp_path / "clip.mp4", [RED, GREEN], seconds=3))
    assert timeline.frames == 12
    assert labels_of(timeline) == ["red", "green"]


def test_live_answers_are_steady_and_close_their_segments(fake: Recognizer) -> None:
    live = Live(fake)
    closed: list[Segment] = []
    answers = []
    for k in range(32):
        colour = RED if k < 12 else GREEN
        answer = live.push(np.full((48, 64, 3), colour, np.uint8), 100 + k / 4)
        answers.append(answer.prediction.label)
        closed += answer.closed
    closed += live.close()
    assert answers[:12] == ["red"] * 12
    assert answers[12] == "red"  # one frame is not yet another action
    assert answers[20:] == ["green"] * 12
    assert [segment.label for segment in closed] == ["red", "green"]


def test_bad_requests_are_refused_at_the_call(tmp_path: Path, fake: Recognizer) -> None:
    path = film(tmp_path / "clip.mp4", [RED])
    wrong: dict[str, Any]
    for wrong in ({"fps": 0}, {"fps": 61}, {"coverage": 1.0}, {"labels": []}):
        with pytest.raises(UsageError):
            stream_video(fake, path, **wrong)
    live = Live(fake)
    for time_s in (math.nan, math.inf):
        with pytest.raises(UsageError):
            live.push_embedding(np.eye(3, dtype=np.float32)[0], time_s)
    assert live.push_embedding(np.eye(3, dtype=np.float32)[0], 100).time_s == 0


def test_text_outputs() -> None:
    segments = [Segment(0, 3661.5, "a <b> & c", 0.5, ("a <b> & c", "d")), Segment(3661.5, 3662, "unknown", 0.25, ())]
    rows = list(csv.DictReader(io.StringIO(to_csv(segments))))
    assert rows[0] == {
        "start_s": "0", "end_s": "3661.5", "label": "a <b> & c", "score": "0.5", "set": "a <b> & c; d"
    }  # fmt: skip
    text = to_webvtt(segments)
    assert "00:00:00.000 --> 01:01:01.500\na &lt;b&gt; &amp; c  50%\n" in text
    assert text.endswith("\nunknown\n")


def test_pictures(tmp_path: Path, fake: Recognizer) -> None:
    path = film(tmp_path / "clip.avi", [RED, GREEN], size=(320, 240))
    segments = recognize_video(fake, path).segments
    sheet = np.asarray(contact_sheet(path, segments))
    assert sheet.shape[2] == 3
    annotate(path, segments, tmp_path / "out.mp4")
    assert not list(tmp_path.glob(".*"))
    with VideoReader(tmp_path / "out.mp4") as reader:
        frames = [np.asarray(frame.image()) for _, frame in reader.frames()]
    assert len(frames) == 120
    assert abs(frames[5][120, 160].astype(int) - RED).max() < 30
    bar = frames[5][-3].astype(int)
    assert np.abs(bar[60] - bar[250]).max() > 40  # two segments, two colours


def test_a_recording_that_changes_its_size_is_drawn_whole(tmp_path: Path) -> None:
    wide, high = film(tmp_path / "a.ts", [RED], size=(320, 240)), film(tmp_path / "b.ts", [GREEN], size=(240, 480))
    annotate(wide.read_bytes() + high.read_bytes(), [], tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as reader:
        *_, (_, last) = reader.frames()
    left, middle = np.asarray(last.image())[120, [20, 160]].astype(int)
    assert left.max() < 30
    assert abs(middle - GREEN).max() < 30


def test_two_hours_take_no_more_memory_than_minutes(tmp_path: Path, fake: Recognizer) -> None:
    path = film(tmp_path / "long.mkv", [RED, GREEN, BLUE] * 8, seconds=300, fps=1)
    recognize_video(fake, film(tmp_path / "short.mkv", [RED, GREEN], seconds=30, fps=1))  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the tests before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timeline = recognize_video(fake, path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert timeline.duration_s == pytest.approx(7200, abs=2)
    assert len(timeline.segments) == 24
    assert grown < 32 * 1024  # KiB


def test_the_command(tmp_path: Path, clean_env: dict[str, str]) -> None:
    good = film(tmp_path / "clip.mp4", [RED, BLUE], size=(320, 240))
    (tmp_path / "bad.mp4").write_bytes(b"nothing")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cliphar", "video", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean_env, timeout=120, check=False)

    outs = [str(tmp_path / f"out{suffix}") for suffix in (".csv", ".jsonl", ".vtt", ".png", ".mp4")]
    done = run(str(good), "--json", "--labels", "cooking, sleeping", *(word for out in outs for word in ("-o", out)))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {"path", "duration_s", "segments"} <= set(answer)
    assert answer["duration_s"] == pytest.approx(12, abs=0.2)
    assert {"start_s", "end_s", "label", "score", "set"} == set(answer["segments"][0])
    assert {"path": answer["path"]} | Timeline.from_dict(answer).to_dict() == answer
    assert all(Path(out).stat().st_size for out in outs)

    mixed = run(str(tmp_path / "bad.mp4"), str(good))
    assert mixed.returncode == 1
    assert len(mixed.stderr.splitlines()) == 1
    assert mixed.stdout.startswith(f"{good}\t0.000\t")

    assert run(str(good), "--out", "x.txt").returncode == 2
    os.mkfifo(pipe := tmp_path / "pipe")
    for path, out in ((good, good), (pipe, "a.png")):
        done = run(str(path), "--out", str(out))
        assert (done.returncode, done.stdout) == (2, "")  # unread


def test_stopped_while_a_pipe_is_silent(tmp_path: Path, clean_env: dict[str, str]) -> None:
    clip = film(tmp_path / "clip.mkv", [RED, BLUE]).read_bytes()
    os.mkfifo(pipe := tmp_path / "pipe")
    command = [sys.executable, "-m", "cliphar", "video", str(pipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_env) as process:
        try:
            with pipe.open("wb") as sender:
                sender.write(clip[: len(clip) * 2 // 3])
                sender.flush()
                time.sleep(2)  # until it waits for more
                process.terminate()
                assert (process.communicate(timeout=60)[1], process.returncode) == ("", 143)
        finally:
            process.kill()


def test_stopped_on_the_way_to_a_silent_camera(clean_env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        command = [sys.executable, "-m", "cliphar", "video", f"tcp://127.0.0.1:{mute.getsockname()[1]}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_env) as process:
            mute.settimeout(60)
            with mute.accept()[0]:
                process.terminate()
                assert (process.communicate(timeout=60)[1], process.returncode) == ("", 143)


def test_a_video_in_a_pipe(tmp_path: Path, fake: Recognizer) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    said: list[Timeline | str] = []
    for name in ("clip.mkv", "clip.mp4"):
        content = film(tmp_path / name, [RED]).read_bytes()
        index = content.find(b"moov") - 4  # at the end, too far off for a buffer
        if name == "clip.mp4":
            content = content[:index] + struct.pack(">I4s", 2**20, b"free").ljust(2**20, b"\0") + content[index:]
        with ThreadPoolExecutor() as pool:
            pool.submit(pipe.write_bytes, content)
            try:
                said.append(recognize_video(fake, pipe))
            except MediaError as error:
                said.append(str(error))
    assert isinstance(said[0], Timeline)
    assert said[1] == f"{pipe} is a pipe, and this video cannot be read from one; save it to a file first"


def test_several_clips_are_not_a_video(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="cannot take list as a video"):
        VideoReader([tmp_path])  # type: ignore[arg-type]
