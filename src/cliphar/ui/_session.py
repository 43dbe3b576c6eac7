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
    "answerer",
    "backend",
    "choose",
    "choose_actions",
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


def answerer() -> tuple[int, str]:
    """A key of who answers, another one for each of the models of one name; good for the session, which keeps them."""
    found = backend()
    return id(found), found.where


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
    ready, edited = (state[shelf].get(_KNOWN, []) for shelf in ("ready_lists", "lists"))
    mine = [word for word in known if word in edited or word not in ready]
    mine += [word for word in edited if word not in ready and word not in known]  # what the visitor added
    for shelf, words in ("ready_lists", known), ("lists", mine):
        others = {name: rest for name, rest in state[shelf].items() if name != _KNOWN}
        state[shelf] = ({_KNOWN: words} if known else {}) | others
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


def add_photos(shelf: str, files: Sequence[tuple[str, bytes]]) -> tuple[list[str], list[str]]:
    """Put photos on a shelf, each once; the digest of each file, and lines that say which were refused, and why."""
    there, refused, over = photos(shelf), [], 0
    digests = [hashlib.sha256(data).hexdigest() for _, data in files]
    for digest, (name, data) in zip(digests, files, strict=True):
        if digest in there:
            continue
        if len(there) >= MAX_PHOTOS:
            over += 1
        elif sum(len(photo.data) for photo in there.values()) + len(data) > _MAX_BYTES:
            refused.append(
                f"{plain(name)} was left out: the photos here would pass {_MAX_BYTES >> 20} MB. Clear some first."
            )
        else:
            try:
                there[digest] = Photo(name, data, digest, thumbnail(data, _THUMBNAIL))
            except MediaError as error:
                refused.append(f"{plain(name)} was left out: {error}.")
    if over:
        count = "1 photo was" if over == 1 else f"{over} photos were"
        refused.append(f"{count} left out: {MAX_PHOTOS} are here already. Clear them to go on.")
    return digests, refused


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
    state.timelines, state.camera_asked = {}, None  # a list that has the word already is answered otherwise from now on
    lists.setdefault(_KNOWN, [])
    for shelf in (lists, state.ready_lists):
        others = [label for label in shelf.get(_KNOWN, []) if label != name]
        shelf[_KNOWN] = [*others, name] if known or name in backend().labels else others
    if known:
        state.current_list = _KNOWN


def choose_actions(page: str) -> tuple[str, ...]:
    """The editor of the list of actions; an empty tuple while the list is empty.

    The lists are the same on every page. The widgets are the page's own: under one name for all, what a page that is
    left while it is being drawn leaves behind would pass for the next page's.
    """
    lists, state = _lists(), st.session_state
    drawn = state.current_list  # what is edited, though another may be chosen before that comes in
    words = lists[drawn]
    list_key, words_key = f"{page}_list", f"{page}_actions"

    # a callback may come when another page is shown, and its widget's value is gone
    def switch() -> None:
        state.current_list = state.get(list_key, drawn)

    def edit() -> None:
        edited = state.get(words_key, words)
        # what was taught may have a comma in its name
        parts = [part for word in edited for part in ([word] if word in words else word.split(","))]
        try:
            lists[drawn] = list(clean_labels(parts)) if edited else []
        except UsageError as error:
            state.refused_action = str(error)

    def restore() -> None:
        lists[drawn] = state.ready_lists[drawn]

    at = list(lists).index(drawn) if _shows(list_key, drawn) else 0
    st.selectbox("List of actions", list(lists), at, key=list_key, on_change=switch)
    st.multiselect(
        "Actions to choose from",
        words,  # and no others to pick from: Enter would take the one that looks most like what was typed
        words if _shows(words_key, words) else None,
        key=words_key,
        on_change=edit,
        accept_new_options=True,
        wrap=True,
        placeholder="Type an action and press Enter",
        help="Any words in English: type one and press Enter, or several with commas. The cross takes one away.",
    )
    if refused := state.pop("refused_action", None):
        st.warning(f"That was not added: {refused}.", icon=":material/info:")
    if words != state.ready_lists[drawn]:
        st.button("Restore this list", on_click=restore, type="tertiary", icon=":material/undo:")
    return tuple(words)


def _shows(key: str, value: object) -> bool:
    """Whether a widget has this value; if not, as when another page was shown since, it is given it.

    What is given reaches the browser unless the run is cut short. What it has must thus be its default too, which a
    browser shows that was never told a value.
    """
    there: bool = st.session_state.get(key) == value
    if not there:
        st.session_state[key] = value
    return there


def choose(page: str) -> tuple[tuple[str, ...], float]:
    """The labels to choose from, and how often the set of filled bars should hold the true one, 0.5 to 0.99."""
    with st.container(key="choices"):
        labels = choose_actions(page)
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
    return labels, coverage
