"""The Video page: a clip in, what happens when, and a click to be there."""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
import time
from html import escape
from pathlib import Path

import numpy as np
import streamlit as st
from PIL import Image

from cliphar.errors import MediaError, UsageError
from cliphar.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, decode_image
from cliphar.timeline import Progress, Segment, Timeline, annotate, colours, contact_sheet, to_csv, to_webvtt
from cliphar.ui._components import plain, play_from
from cliphar.ui._session import answerer, backend, choose, sample_photos, use_first_list
from cliphar.ui._show import spreadsheet

__all__ = ["video_page"]

_TYPES = sorted(one[1:] for one in VIDEO_SUFFIXES - IMAGE_SUFFIXES)
_MAX_MB = 60  # a service takes 64 MB in all


def video_page() -> None:
    """Draw the page."""
    st.title("What happens when?", anchor=False)
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.file_uploader(
            "Drop a clip here, or choose one",
            type=_TYPES,
            max_upload_size=_MAX_MB,
            key=_field(),
            on_change=_take_upload,
        )
        labels, coverage = choose("video")
    with right:
        if "clip_file" not in st.session_state:
            st.info("Add a clip and its timeline appears here. Or try a sample:", icon=":material/movie:")
            st.button("Try the sample clip", on_click=_take_sample)
        elif not labels:
            st.info("The list of actions is empty. Type at least one.", icon=":material/edit:")
        else:
            name, content = st.session_state.clip_file
            try:
                _show(name, content, _read(content, labels, coverage))
            except (MediaError, UsageError) as error:
                st.error(f"{plain(name)}: {error}.", icon=":material/error:")
            st.button("Clear the clip", on_click=_clear)


def _field() -> str:
    return f"clip_{st.session_state.get('clip_round', 0)}"


def _take_upload() -> None:
    state = st.session_state
    if upload := state.get(_field()):
        state.clip_file = upload.name, upload.getvalue()
    elif _field() in state:  # else another page is shown
        state.pop("clip_file", None)


def _clear() -> None:
    st.session_state.pop("clip_file", None)  # a second click may come before the page is drawn without it
    st.session_state.clip_round = st.session_state.get("clip_round", 0) + 1


def _take_sample() -> None:
    st.session_state.clip_file = "sample.mp4", _sample_clip()
    use_first_list()


def _read(content: bytes, labels: tuple[str, ...], coverage: float) -> Timeline:
    """The clip's timeline, kept for the session: a click does not read it again."""
    known: dict[object, Timeline] = st.session_state.setdefault("timelines", {})
    key = (answerer(), hashlib.sha256(content).hexdigest(), labels, coverage)
    bar = st.empty()  # also where there is nothing to read: what follows keeps its place, and so the focus
    if key in known:
        return known[key]
    bar.progress(0.0, "Reading the clip")
    since = time.monotonic()
    try:
        for item in backend().video(content, labels, coverage):
            if isinstance(item, Timeline):
                known[key] = item
            elif isinstance(item, Progress) and item.duration_s:
                share = min(1.0, item.time_s / item.duration_s)
                left = (time.monotonic() - since) * (1 - share) / max(share, 0.01)
                bar.progress(share, f"Reading the clip, about {left:.0f} s left")
    finally:
        bar.empty()
    return known[key]


def _show(name: str, content: bytes, found: Timeline) -> None:
    with st.container(gap=None):
        st.video(content)
        play_from(*st.session_state.get("clip_jump", (0, 0)))
    if found.warning:
        st.warning(f"{found.warning}.", icon=":material/info:")
    st.html(_bar(found))
    with st.container(border=True):
        for i, segment in enumerate(found.segments):
            share = f"{segment.score * 100:.0f} %"
            st.button(
                f"{_clock(segment.start_s)} to {_clock(segment.end_s)}: **{plain(segment.label)}**, {share}",
                key=f"segment_{i}",
                on_click=_jump,
                args=(segment.start_s,),
                type="tertiary",
                icon=":material/play_arrow:",
                help="The action is one of: " + ", ".join(map(plain, segment.set)),
            )
    pictures = ", ".join(f"{segment.label} at {_clock(segment.start_s)}" for segment in found.segments)
    st.image(_sheet(content, found.segments), caption="The middle of each segment", alt=pictures)
    stem = Path(name).stem
    with st.container(horizontal=True):
        table = spreadsheet(csv.reader(to_csv(found.segments).splitlines()))
        st.download_button("Table (CSV)", table, f"{stem}.csv", "text/csv", on_click="ignore")
        st.download_button(
            "Subtitles (WebVTT)", to_webvtt(found.segments), f"{stem}.vtt", "text/vtt", on_click="ignore"
        )
        st.download_button(
            "Annotated video (MP4)",
            lambda: _annotated(content, found.segments),
            f"{stem}-annotated.mp4",
            "video/mp4",
            on_click="ignore",
        )


def _jump(start_s: float) -> None:
    state = st.session_state
    state.clip_jump = start_s, state.get("clip_jump", (0, 0))[1] + 1


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)  # 59.96 is 1:00
    return f"{minutes:.0f}:{rest:04.1f}"


def _bar(found: Timeline) -> str:
    """The timeline as one bar under the player; those who cannot see it have the list below."""
    whole, colour = max(found.duration_s, 0.001), colours(found.segments)
    parts = "".join(
        f"<div title='{escape(segment.label)}' style='position:absolute;top:0;bottom:0;"
        f"left:{segment.start_s / whole:.3%};width:{(segment.end_s - segment.start_s) / whole:.3%};"
        f"background:{colour[segment.label]}'></div>"
        for segment in found.segments
    )
    keys = "".join(
        f"<span><span style='color:{shade}'>&#9632;</span> <bdi>{escape(label)}</bdi></span>"
        for label, shade in colour.items()
    )
    return (
        "<div class='cl-timeline' aria-hidden='true'><div style='position:relative;height:1.1rem;border-radius:.4rem;"
        "overflow:hidden;background:color-mix(in srgb, currentColor 12%, transparent)'>"
        f"{parts}</div><div class='cl-keys'>{keys}</div></div>"
    )


@st.cache_data(max_entries=8, show_spinner=False)
def _sheet(content: bytes, segments: tuple[Segment, ...]) -> bytes:
    buffer = io.BytesIO()
    contact_sheet(content, segments).save(buffer, "PNG")
    return buffer.getvalue()


def _annotated(content: bytes, segments: tuple[Segment, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "annotated.mp4"
        annotate(content, segments, target)
        return target.read_bytes()


@st.cache_data(show_spinner=False)
def _sample_clip() -> bytes:
    """The sample photos, seven seconds each, with a slow zoom."""
    import av

    buffer = io.BytesIO()
    width, height, rate, count = 640, 360, 10, 70
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _, data in sample_photos():
            photo = decode_image(data)
            for k in range(count):
                w = min(photo.width, photo.height * width / height) * (1 - 0.15 * k / count)
                h = w * height / width
                x, y = (photo.width - w) / 2, (photo.height - h) / 4  # heads are in the upper half
                picture = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()
