"""How photos come in: from files, the clipboard, the camera or the samples, onto a page's shelf."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

import streamlit as st

from cliphar.ui._components import pasted_photos, plain
from cliphar.ui._session import add_photos, photos, sample_photos, use_sample_list

__all__ = ["NO_CAMERA", "clear_photos", "gives_camera", "offer_samples", "take_in"]

_TYPES = ["jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "jfif"]
_MAX_MB = 50
NO_CAMERA = (
    "Browsers give the camera only to pages on https or localhost, and this one is on neither. Put TLS in front of it, "
    "or run `ssh -L 8501:localhost:8501 SERVER` and open http://localhost:8501."
)


def take_in(shelf: str) -> None:
    """Ways to bring photos in; what is refused is said below."""
    state = st.session_state
    key = f"{shelf}_upload_{state.get(f'{shelf}_round', 0)}"
    seen: dict[str, str] = state.setdefault(f"{shelf}_seen", {})

    def drop() -> None:  # a cross in the upload field takes its photo away
        if key not in state:  # another page is shown already
            return
        before: dict[str, str] = state[f"{shelf}_seen"]
        for digest in set(before.values()) - {before.get(file.file_id) for file in state[key]}:
            photos(shelf).pop(digest, None)

    files, camera = st.tabs(["Photos", "Camera"])
    with files:
        uploads = st.file_uploader(
            "Drop photos here, or choose them",
            type=_TYPES + ["heic", "heif"] * bool(find_spec("pillow_heif")),
            accept_multiple_files=True,
            max_upload_size=_MAX_MB,
            key=key,
            on_change=drop,
        )
        pasted, large = pasted_photos(f"{shelf}_paste", _MAX_MB)
    with camera:
        shot = None
        if not gives_camera():
            st.warning(NO_CAMERA, icon=":material/lock:")
        elif st.toggle("Turn on the camera", key=f"{shelf}_camera"):
            shot = st.camera_input("Take a photo", key=f"{shelf}_shot")
    new = [file for file in uploads if file.file_id not in seen]
    if shot and shot.file_id != state.get(f"{shelf}_last"):
        pasted.append((shot.name, shot.getvalue()))
    digests, refused = add_photos(shelf, [(file.name, file.getvalue()) for file in new] + pasted)
    refused += [f"{plain(name)} was left out: it is over {_MAX_MB} MB. Make it smaller first." for name in large]
    for line in refused:
        st.error(line, icon=":material/error:")
    # only now: another run may have begun in place of this one at any line above
    known = seen | {file.file_id: digest for file, digest in zip(new, digests, strict=False)}
    # what was uploaded before another page was shown has left the field
    state[f"{shelf}_seen"] = {file.file_id: known[file.file_id] for file in uploads}
    state[f"{shelf}_last"] = shot and shot.file_id


def gives_camera() -> bool:
    """Whether browsers give a camera to a page at this address."""
    address = urlsplit(st.context.url or "")
    host = address.hostname or "localhost"
    return address.scheme == "https" or host in ("localhost", "::1") or host.startswith("127.")


def offer_samples(shelf: str) -> None:
    """The sample photos, each with a button that takes it and the list of actions that goes with them."""
    with st.container(horizontal=True, key="samples"):
        for name, data in sample_photos():
            title = name.removesuffix(".jpg")
            with st.container(width=150):
                st.image(data, alt=f"sample photo: {title}", width=140)
                st.button(f"Try {title}", key=f"{shelf}_{name}", on_click=_add_sample, args=(shelf, name, data))


def _add_sample(shelf: str, name: str, data: bytes) -> None:
    add_photos(shelf, [(name, data)])
    use_sample_list()


def clear_photos(shelf: str) -> None:
    """Take all photos off a shelf, and their names out of the upload field."""
    photos(shelf).clear()
    st.session_state[f"{shelf}_round"] = st.session_state.get(f"{shelf}_round", 0) + 1
