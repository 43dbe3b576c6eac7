"""The Photo page: photos in, answers as bars, and a list of actions to play with."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from cliphar.errors import MediaError
from cliphar.recognizer import Prediction
from cliphar.ui._backend import Photo
from cliphar.ui._components import plain
from cliphar.ui._intake import clear_photos, offer_samples, take_in
from cliphar.ui._session import backend, choose, photos
from cliphar.ui._show import answer_html, spreadsheet

__all__ = ["photo_page"]

_SHELF = "photo"


def photo_page() -> None:
    """Draw the page."""
    st.title("What are they doing?", anchor=False)
    left, right = st.columns([2, 3], gap="large")
    with left:
        take_in(_SHELF)
        labels, coverage = choose(_SHELF)
    with right:
        shown = list(photos(_SHELF).values())
        if not shown:
            st.info("Add a photo and its answer appears here. Or try a sample:", icon=":material/photo:")
            offer_samples(_SHELF)
        elif not labels:
            st.info("The list of actions is empty. Type at least one.", icon=":material/edit:")
        else:
            _answers(shown, labels, coverage)


def _answers(shown: list[Photo], labels: Sequence[str], coverage: float) -> None:
    answers = backend().answer(shown, labels, coverage)
    bars, long = 5 if len(shown) > 1 else 10, len(shown) > 4
    if long:  # nobody should have to pass them all
        _all(shown, answers)
    for photo, answer in reversed(list(zip(shown, answers, strict=True))):
        with st.container(border=True, key=f"answer_{photo.digest[:12]}"):
            picture, text = st.columns([2, 3])
            picture.image(photo.thumbnail, alt=f"the photo {photo.name}", width="stretch")
            if isinstance(answer, MediaError):
                text.error(f"{plain(photo.name)}: {answer}", icon=":material/error:")
            else:
                text.html(answer_html(answer, coverage, bars))
            text.button(
                f"Remove {plain(photo.name)}",
                key=f"remove_{photo.digest}",
                on_click=_remove,
                args=(photo.digest,),
                type="tertiary",
            )
    if not long:
        _all(shown, answers)


def _all(shown: list[Photo], answers: list[Prediction | MediaError]) -> None:
    with st.container(horizontal=True):
        st.download_button("Download answers (CSV)", _csv(shown, answers), "answers.csv", "text/csv", on_click="ignore")
        st.button("Clear all photos", on_click=clear_photos, args=(_SHELF,))


def _remove(digest: str) -> None:
    photos(_SHELF).pop(digest, None)


def _csv(shown: list[Photo], answers: list[Prediction | MediaError]) -> bytes:
    rows: list[Sequence[str]] = [("path", "label", "score", "set", "error")]
    for photo, answer in zip(shown, answers, strict=True):
        if isinstance(answer, MediaError):
            rows.append((photo.name, "", "", "", str(answer)))
        else:
            rows.append((photo.name, answer.label, f"{answer.score:.6f}", ";".join(answer.set), ""))
    return spreadsheet(rows)
