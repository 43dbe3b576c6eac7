"""The speed of a bundle's runtimes on this machine, as ``cliphar bench`` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from cliphar.errors import ClipharError

__all__ = ["known_speeds", "measure_speeds"]

_TURNS = 3
_MEASURING = threading.Lock()  # two at a time would measure each other
_KNOWN: dict[Path, dict[str, Any]] = {}  # for all visitors: it is one machine


def known_speeds(model: Path) -> dict[str, Any] | None:
    """What was last measured since the page was started, as ``cliphar bench --json`` prints it."""
    return _KNOWN.get(model)


def measure_speeds(model: Path, runtimes: Sequence[str]) -> None:
    """Measure, with progress on the page.

    Raises:
        ClipharError: nothing could be measured, or it is being measured for another visitor.
    """
    if not _MEASURING.acquire(blocking=False):
        raise ClipharError("another visitor is measuring; try again in half a minute")
    bar = st.progress(0.0, "Starting")
    command = [sys.executable, "-m", "cliphar", "bench", str(model), "--runtime", ",".join(runtimes)]
    command += ["--batch", "1,8", "--seconds", "1", "--json"]
    steps, last = len(runtimes) + _TURNS, "it ended early"
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None and process.stderr is not None  # noqa: S101 - both are pipes
                for step, line in enumerate(process.stderr):
                    last = line.strip()
                    bar.progress(min(1.0, step / steps), last.capitalize())
                told = process.stdout.read()
            except BaseException:  # the visitor went to another page, which ends this script
                process.kill()
                raise
        if process.returncode != 0:
            raise ClipharError(f"the speed was not measured: {last.removeprefix('cliphar: ')}")
        _KNOWN[model] = json.loads(told)
    finally:
        _MEASURING.release()
        bar.empty()
