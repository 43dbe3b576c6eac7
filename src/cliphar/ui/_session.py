"""What a visitor has at hand: the backend, the photos and the lists of actions. All of it lives in the session."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import streamlit as st

from cliphar.bundle import packaged
from cliphar.errors import ClipharError, MediaError, UsageError
from cliphar.labels import clean_labels, read_labels_file, vocabularies
from cliphar.ui._backend import Backend, Photo
from cliphar.ui._components import plain
from cliphar.ui._local import LocalBackend
from cliphar.ui._remote import RemoteBackend
from cliphar.ui._show import thumbnail

__all__ = [
    "MAX_PHOTOS",
    "add_photos",
    "backend",
    "choose_actions",
    "choose_coverage",
    "know_action",
    "photos",
    "refusing",
    "sample_photos",
    "use_first_list",
    "use_model",
    "use_sample_list",
]

MAX_PHOTOS = 50
_MAX_BYTES = 150 * 2**20
_THUMBNAIL = 480
_KNOWN = "What the model knows"
_OWN = "Your own"
_SAMPLES = "For the samples"


def backend() -> Backend:
    """This session's backend; a ClipharError if there is no such model or no service answers."""
    if "backend" not in st.session_state:
        url = os.environ.get("CLIPHAR_API_URL")
        with st.spinner("Waiting for the model"):
            made = RemoteBackend(url) if url else LocalBackend(os.environ.get("MODEL_PATH") or None)
        st.session_state.backend = made
    found: Backend = st.session_state.backend
    return found


def use_model(model: str) -> None:
    """Answer by another bundle from now on; what was taught to this one is there when it is chosen again."""
    state, before = st.session_state, backend()
    _lists()
    kept: dict[str, LocalBackend] = state.setdefault("backends", {})
    if isinstance(before, LocalBackend):
        before.discard()
        kept[str(before.model)] = before
    state.lesson = None
    state.backend = kept.get(model) or LocalBackend(model)
    known = list(backend().labels)
    for shelf in ("ready_lists", "lists"):
        others = {name: words for name, words in state[shelf].items() if name != _KNOWN}
        state[shelf] = ({_KNOWN: known} if known else {}) | others
    if state.current_list not in state.lists:
        state.current_list = next(iter(state.lists))


@contextmanager
def refusing() -> Iterator[None]:
    """For callbacks: what is refused in it is said at the top of the page."""
    try:
        yield
    except ClipharError as error:
        st.session_state.refused = str(error)


def photos(shelf: str) -> dict[str, Photo]:
    """The photos that were put on a shelf (one a page), by digest, in their order."""
    found: dict[str, Photo] = st.session_state.setdefault(f"{shelf}_photos", {})
    return found


def add_photos(shelf: str, files: Sequence[tuple[str, bytes]]) -> list[str]:
    """Put photos on a shelf, each once; lines that say which were refused, and why."""
    there, refused, over = photos(shelf), [], 0
    for name, data in files:
        digest = hashlib.sha256(data).hexdigest()
        if digest in there:
            continue
        if len(there) >= MAX_PHOTOS:
            over += 1
        elif sum(len(photo.data) for photo in there.values()) + len(data) > _MAX_BYTES:
            refused.append(f"{name} was left out: the photos here would pass {_MAX_BYTES >> 20} MB. Clear some first.")
        else:
            try:
                there[digest] = Photo(name, data, digest, thumbnail(data, _THUMBNAIL))
            except MediaError as error:
                refused.append(f"{name} was left out: {error}.")
    if over:
        count = "1 photo was" if over == 1 else f"{over} photos were"
        refused.append(f"{count} left out: {MAX_PHOTOS} are here already. Clear them to go on.")
    return refused


def sample_photos() -> list[tuple[str, bytes]]:
    """The photos that come with the package: name and encoded bytes."""
    return sorted((file.name, file.read_bytes()) for file in packaged("samples").glob("*.jpg"))


def use_sample_list() -> None:
    """Choose the list of actions that goes with the sample photos."""
    lists, state = _lists(), st.session_state
    words = read_labels_file(packaged("samples") / "labels.txt")
    for place in (lists, state.ready_lists):
        place.setdefault(_SAMPLES, list(words))
    state.current_list = _SAMPLES


def use_first_list() -> None:
    """Choose what the model knows, or else the first ready list."""
    st.session_state.current_list = next(iter(_lists()))


def _lists() -> dict[str, list[str]]:
    """The lists as the visitor has them, by name: what the model knows, the ready ones, and an empty one."""
    state = st.session_state
    if "lists" not in state:
        known = list(backend().labels)
        ready = {name: list(words) for name, words in vocabularies().items() if set(words) != set(known)}
        state.ready_lists = ({_KNOWN: known} if known else {}) | ready | {_OWN: []}
        state.lists = dict(state.ready_lists)
        state.current_list = next(iter(state.lists))
    found: dict[str, list[str]] = state.lists
    return found


def know_action(name: str, *, known: bool = True) -> None:
    """Add an action to the list of what the model knows, and choose that list; or take one off."""
    lists, state = _lists(), st.session_state
    lists.setdefault(_KNOWN, [])
    for shelf in (lists, state.ready_lists):
        others = [label for label in shelf.get(_KNOWN, []) if label != name]
        shelf[_KNOWN] = [*others, name] if known or name in backend().labels else others
    if known:
        state.current_list = _KNOWN


def choose_actions() -> tuple[str, ...]:
    """The editor of the list of actions, the same on every page; an empty tuple while the list is empty."""
    lists, state = _lists(), st.session_state

    def switch() -> None:
        state.current_list = state.list_name

    def edit() -> None:
        try:
            lists[state.current_list] = list(clean_labels(",".join(state.actions))) if state.actions else []
        except UsageError as error:
            state.refused_action = str(error)

    def restore() -> None:
        lists[state.current_list] = state.ready_lists[state.current_list]

    # the widgets forget their values when another page is shown; the lists do not
    words = lists[state.current_list]
    for key, value in (("list_name", state.current_list), ("actions", words)):
        if state.get(key) != value:
            state[key] = value
    st.selectbox("List of actions", list(lists), key="list_name", on_change=switch)
    st.multiselect(
        "Actions to choose from",
        list(dict.fromkeys(word for some in (words, *state.ready_lists.values()) for word in some)),
        key="actions",
        on_change=edit,
        accept_new_options=True,
        select_all=False,
        wrap=True,
        placeholder="Type an action and press Enter",
        help="Any words in English: type one and press Enter, or several with commas. The cross takes one away.",
    )
    if refused := state.pop("refused_action", None):
        st.warning(f"That was not added: {refused}.", icon=":material/info:")
    if words != state.ready_lists[state.current_list]:
        st.button("Restore this list", on_click=restore, type="tertiary", icon=":material/undo:")
    return tuple(words)


def choose_coverage(labels: Sequence[str]) -> float:
    """How often the set of filled bars should hold the true one of the labels, 0.5 to 0.99."""
    coverage: float = st.select_slider(
        "How often the filled bars should hold the true action",
        [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99],
        value=0.9,
        format_func=lambda share: f"{share * 100:.0f} %",
        key="coverage",
        persist_state="session",
        help="More certainty takes more labels. Measured on photos that the model never saw.",
    )
    if taught := [name for name in backend().taught if name in labels]:
        st.caption(
            f"Not measured for what was taught ({', '.join(map(plain, taught))}): there the share may be another."
        )
    return coverage
