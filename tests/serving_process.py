"""A service in a process of its own, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["serving"]


@contextmanager
def serving(env: dict[str, str], *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "cliphar", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        try:
            assert '"ready"' in first, first + process.stderr.read()
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            yield json.loads(first)["address"], process
        finally:
            process.terminate()
            process.wait(30)
