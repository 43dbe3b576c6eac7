"""Which code this is."""

from __future__ import annotations

import os
import subprocess

__all__ = ["code_revision"]


def code_revision() -> str:
    """CLIPHAR_REVISION, which an image is built with; else the working directory's git commit; else ``unknown``."""
    told = os.environ.get("CLIPHAR_REVISION")
    if told:
        return told
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # there is no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
