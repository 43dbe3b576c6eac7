"""The Teach page: name an action, show a few photos of it, see how well it works, keep it or not."""

from __future__ import annotations

import streamlit as st

from cliphar.errors import ClipharError, UsageError
from cliphar.recognizer import Lesson
from cliphar.ui._components import plain
from cliphar.ui._intake import clear_photos, take_in
from cliphar.ui._session import backend, know_action, photos, refusing

__all__ = ["teach_page"]

_SHELF = "teach"
_FEWEST = 3


def teach_page() -> None:
    """Draw the page."""
    st.title("Teach it an action", anchor=False)
    left, right = st.columns([2, 3], gap="large")
    with left:
        name = st.text_input(
            "Name of the action",
            key="teach_name",
            placeholder="watering a bonsai",
            max_chars=200,
            persist_state="session",
        ).strip()
        take_in(_SHELF)
        shown = photos(_SHELF)
        asked = st.button("Teach", type="primary")
        if asked and not name:
            st.warning("Give the action a name first.", icon=":material/edit:")
        elif asked and len(shown) < _FEWEST:
            st.warning(f"Give 3 to 10 photos of it; here are {len(shown)}.", icon=":material/photo:")
        elif asked:
            _teach(name)
    with right:
        lesson: Lesson | None = st.session_state.get("lesson")
        if lesson:
            _report(lesson)
        if shown:
            st.header(f"Photos: {len(shown)}", anchor=False)
            with st.container(horizontal=True, key="examples"):
                for photo in shown.values():
                    st.image(photo.thumbnail, alt=f"example: {photo.name}", width=108)
            st.button("Clear these photos", on_click=clear_photos, args=(_SHELF,))
        elif not lesson:
            st.info(
                "Name an action and give 3 to 10 photos of it. Photos of other people and places help most.",
                icon=":material/school:",
            )
        _taught()


def _teach(name: str) -> None:
    try:
        with st.spinner("Learning, and trying each photo without having seen it"):
            st.session_state.lesson = backend().teach(name, list(photos(_SHELF).values()))
    except ClipharError as error:
        st.error(f"{error}.", icon=":material/error:")


def _report(lesson: Lesson) -> None:
    with st.container(border=True, key="lesson"):
        st.header(plain(lesson.name), anchor=False)
        if lesson.recall is not None:
            right = round(lesson.recall * lesson.photos)
            st.metric("Recognised when held back", f"{right} of {lesson.photos}")
            st.caption(
                "Each photo was held back once, taught from the others, and then told apart from "
                f"the {len(set(backend().labels) - {lesson.name})} actions known so far."
            )
        if lesson.confused_with:
            mixed = ", ".join(
                f"{plain(label)} ({round(share * lesson.photos)})" for label, share in lesson.confused_with
            )
            st.warning(f"Confused with: {mixed}. More and more varied photos help.", icon=":material/compare_arrows:")
        for error in lesson.refused:
            st.error(f"One photo was left out: {error}.", icon=":material/error:")
        with st.container(horizontal=True):
            st.button("Keep it", type="primary", on_click=_keep, args=(lesson,), icon=":material/check:")
            st.button("Discard it", on_click=_discard, icon=":material/delete:")


def _keep(lesson: Lesson) -> None:
    with refusing():
        backend().keep()
        if lesson.name not in backend().taught:  # another had a service forget it, or changed its model
            raise UsageError(f"'{lesson.name}' is not known any more; teach it again")
        know_action(lesson.name)
        _end()
        st.toast(f"{plain(lesson.name)} is now in the list of what the model knows.", icon=":material/check:")


def _discard() -> None:
    with refusing():
        backend().discard()
        _end()


def _end() -> None:
    st.session_state.lesson = None
    st.session_state.teach_name = ""
    clear_photos(_SHELF)


def _taught() -> None:
    taught = backend().taught
    if not taught:
        return
    st.header("Taught so far", anchor=False)
    for name, count in taught.items():
        with st.container(horizontal=True, vertical_alignment="center"):
            st.write(f"**{plain(name)}**, from {count} {'photo' if count == 1 else 'photos'}")
            st.button("Forget", key=f"forget_{name}", on_click=_forget, args=(name,), type="tertiary")


def _forget(name: str) -> None:
    with refusing():
        if name in backend().taught:  # else it is a second click
            backend().forget(name)
        know_action(name, known=False)
