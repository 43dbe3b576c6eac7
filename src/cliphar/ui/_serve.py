"""Streamlit, with what the first visitor would wait for loaded beside its start."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import suppress

from cliphar.errors import ClipharError


def _warm() -> None:
    import cliphar.ui._app  # noqa: F401 - imported early
    from cliphar.ui._local import LocalBackend

    if not os.environ.get("CLIPHAR_API_URL"):
        with suppress(ClipharError):  # the page says so
            LocalBackend(os.environ.get("MODEL_PATH") or None)
    # Streamlit collects garbage after each run of the script; what is here for good need not be looked through
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    from streamlit.web.cli import main

    threading.Thread(target=_warm).start()
    main(prog_name="streamlit")
