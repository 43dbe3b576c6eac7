"""The speed of a bundle's runtimes, as ``cliphar bench`` has it; of a service, as the page asks it."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamlit as st

from cliphar.errors import ClipharError, MediaError
from cliphar.labels import vocabularies
from cliphar.ui._backend import Backend, Photo
from cliphar.ui._session import sample_photos

__all__ = ["known_speeds", "measure_round_trips", "measure_speeds"]

_TURNS = 3
_CALLS, _BATCHES, _BATCH = 15, 2, 16
_MEASURING = threading.Lock()  # two would measure each other
_KNOWN: dict[Path, dict[str, Any]] = {}  # for all: it is one machine


def known_speeds(model: Path) -> dict[str, Any] | None:
    """What was last measured here, as ``cliphar bench --json`` prints it."""
    return _KNOWN.get(model)


def measure_speeds(model: Path, runtimes: Sequence[str]) -> None:
    """Measure, with progress on the page.

    Raises:
        ClipharError: nothing could be measured, or it is being measured for another visitor.
    """
    command = [sys.executable, "-m", "cliphar", "bench", str(model), "--runtime", ",".join(runtimes)]
    command += ["--batch", "1,8", "--seconds", "1", "--json"]
    steps, last = len(runtimes) + _TURNS, "it ended early"
    with _measuring():
        bar = st.progress(0.0, "Starting")
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
            bar.empty()


@contextmanager
def _measuring() -> Iterator[None]:
    if not _MEASURING.acquire(blocking=False):
        raise ClipharError("another visitor is measuring; try again in half a minute")
    try:
        yield
    finally:
        _MEASURING.release()


def measure_round_trips(backend: Backend) -> tuple[float, float]:
    """The median milliseconds from a photo sent to its answer, and the photos answered a second, 16 at once.

    Raises:
        ClipharError: the service did not answer, or it is being measured for another visitor.
    """
    with _measuring():
        labels = vocabularies()["Everyday actions"]
        photos = _new_photos()
        backend.answer([next(photos)], labels, 0.9)  # the words are embedded once
        single = [_seconds(backend, [next(photos)], labels) for _ in range(_CALLS)]
        many = min(_seconds(backend, [next(photos) for _ in range(_BATCH)], labels) for _ in range(_BATCHES))
    return 1000 * statistics.median(single), _BATCH / many


def _new_photos() -> Iterator[Photo]:
    """A sample photo, each time other bytes: a service keeps what it was asked before."""
    name, data = sample_photos()[0]
    mark = time.time_ns()
    for number in itertools.count():
        changed = data + f"{mark} {number}".encode()  # behind a JPEG's end, where nobody looks
        yield Photo(name, changed, hashlib.sha256(changed).hexdigest(), b"")


def _seconds(backend: Backend, photos: list[Photo], labels: Sequence[str]) -> float:
    since = time.perf_counter()
    for answer in backend.answer(photos, labels, 0.9):
        if isinstance(answer, MediaError):
            raise answer
    return time.perf_counter() - since
