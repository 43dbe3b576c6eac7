"""The Photo page: photos in, answers as bars, and a list of actions to play with."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import streamlit as st

from cliphar.errors import MediaError
from cliphar.recognizer import Prediction
from cliphar.ui._backend import Photo
from cliphar.ui._session import add_photos, backend, choose_actions, photos, sample_photos
from cliphar.ui._show import answer_html

__all__ = ["photo_page"]

_SHELF = "photo"
_TYPES = ["jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "jfif"]
_MAX_MB = 50


def photo_page() -> None:
    """Draw the page."""
    st.title("What are they doing?")
    left, right = st.columns([2, 3], gap="large")
    with left:
        _take_in()
        labels = choose_actions()
        coverage: float = st.select_slider(
            "How often the filled bars should hold the true action",
            [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
            value=0.9,
            format_func=lambda share: f"{share * 100:.0f} %",
            key="coverage",
            persist_state="session",
            help="More certainty takes more labels. Measured on photos the model never saw.",
        )
    with right:
        shown = list(photos(_SHELF).values())
        if not shown:
            st.info("Add a photo on this page, or take a sample, and the answer appears here.", icon=":material/photo:")
        elif not labels:
            st.info("The list of actions is empty. Type at least one.", icon=":material/edit:")
        else:
            _answers(shown, labels, coverage)


def _take_in() -> None:
    refused: list[str] = []
    state = st.session_state
    drop, camera, sample = st.tabs(["Photos", "Camera", "Samples"])
    with drop:
        files = st.file_uploader(
            "Drop photos here, or choose them",
            type=_TYPES,
            accept_multiple_files=True,
            max_upload_size=_MAX_MB,
            key=f"upload_{state.get('upload_round', 0)}",
        )
        seen: set[str] = state.setdefault("uploads_seen", set())
        refused += add_photos(_SHELF, [(file.name, file.getvalue()) for file in files if file.file_id not in seen])
        seen.update(file.file_id for file in files)
    with camera:
        shot = st.camera_input("Take a photo", key="shot") if st.toggle("Turn on the camera", key="camera_on") else None
        if shot is not None and shot.file_id not in seen:
            seen.add(shot.file_id)
            refused += add_photos(_SHELF, [("camera.jpg", shot.getvalue())])
    with sample, st.container(horizontal=True):
        for name, data in sample_photos():
            title = name.removesuffix(".jpg")
            with st.container(width=116, key=f"sample_box_{title}"):
                st.image(data, alt=f"sample photo: {title}", width=108)
                st.button(title, key=f"sample_{name}", on_click=_add_sample, args=(name, data), type="tertiary")
    for line in refused:
        st.error(line, icon=":material/error:")


def _answers(shown: list[Photo], labels: Sequence[str], coverage: float) -> None:
    answers = backend().answer(shown, labels, coverage)
    bars = 5 if len(shown) > 1 else 10
    for photo, answer in reversed(list(zip(shown, answers, strict=True))):
        with st.container(border=True, key=f"answer_{photo.digest[:12]}"):
            picture, text = st.columns([2, 3])
            picture.image(photo.thumbnail, alt=f"the photo {photo.name}", width="stretch")
            if isinstance(answer, MediaError):
                text.error(f"{photo.name}: {answer}", icon=":material/error:")
            else:
                text.html(answer_html(answer, coverage, bars))
            text.button("Remove", key=f"drop_{photo.digest}", on_click=_remove, args=(photo.digest,), type="tertiary")
    with st.container(horizontal=True):
        st.download_button("Download answers (CSV)", _csv(shown, answers), "answers.csv", "text/csv", on_click="ignore")
        st.button("Clear all photos", on_click=_clear)


def _add_sample(name: str, data: bytes) -> None:
    add_photos(_SHELF, [(name, data)])


def _remove(digest: str) -> None:
    photos(_SHELF).pop(digest, None)


def _clear() -> None:
    photos(_SHELF).clear()
    st.session_state.upload_round = st.session_state.get("upload_round", 0) + 1


def _csv(shown: list[Photo], answers: list[Prediction | MediaError]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(("path", "label", "score", "set"))
    for photo, answer in zip(shown, answers, strict=True):
        if not isinstance(answer, MediaError):
            writer.writerow((photo.name, answer.label, f"{answer.score:.6f}", ";".join(answer.set)))
    return buffer.getvalue()
