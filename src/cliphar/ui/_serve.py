"""Streamlit, with what the first visitor would wait for loaded beside its start."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from cliphar.errors import ClipharError


def _warm() -> None:
    from cliphar.ui._local import LocalBackend
    from cliphar.ui._remote import RemoteBackend  # noqa: F401 - imported early

    if not os.environ.get("CLIPHAR_API_URL"):
        with suppress(ClipharError):  # the page says so
            LocalBackend(os.environ.get("MODEL_PATH") or None)


if __name__ == "__main__":
    from streamlit.web.cli import main

    threading.Thread(target=_warm).start()
    main(prog_name="streamlit")
