"""A service in a process of its own, and what other tests of processes share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bounded", "free_port", "problem", "read_terminal", "serving"]


@contextmanager
def bounded(process: subprocess.Popen[str], limit_s: float = 120) -> Iterator[None]:
    """Kill the process if the block takes longer, for a read from its pipe would wait for ever."""
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def serving(env: dict[str, str], *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "cliphar", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        with bounded(process):
            first = process.stderr.readline()
        try:
            if '"ready"' not in first:
                process.kill()
                raise AssertionError(first + process.stderr.read())
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            yield json.loads(first)["address"], process
        finally:
            process.terminate()
            with bounded(process, 60):
                process.wait()


def problem(response: Any, status: int) -> str:
    """The detail of a refusal, once it is as every refusal should be."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == status
    assert document["request_id"] == response.headers["x-request-id"]
    detail: str = document["detail"]
    assert "\n" not in detail
    assert "/src/" not in detail
    return detail


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def read_terminal(ours: int) -> str:
    """All that is written to the other side of a pseudo-terminal until nobody has it open; closes this side."""
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as file:
        while True:
            try:
                part = file.read(65536)
            except OSError:  # how Linux says that the other side is closed
                part = b""
            if not part:
                return shown.decode()
            shown += part
