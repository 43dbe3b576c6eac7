"""What a training shows: lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

from cliphar.cli import _follow
from cliphar.training import StepReport
from serving_process import read_terminal

CODE = """
from cliphar.cli._follow import following
from cliphar.training import StepReport
with following() as (log, on_step):
    log("begun [bold]")
    for step in range(1, 41):
        on_step(StepReport(step, 40, 0, 1.5, 1e-4, 320.0, 0.1))
    log("ended")
"""


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(_follow.time, "monotonic", lambda: now[0])
    with _follow.following() as (log, on_step):
        log("begun")
        for step in range(1, 41):
            now[0] += 1.0
            on_step(StepReport(step, 100, 0, 1.5, 1e-4, 32.0, 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "begun",
        "step 15/100: loss 1.5000, 32.0 photos/s, 0:01:25 left",
        "step 30/100: loss 1.5000, 32.0 photos/s, 0:01:10 left",
    ]


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = read_terminal(ours)
    assert process.wait(60) == 0
    assert "begun [bold]" in text
    assert "40/40" in text
    assert "320.0 photos/s" in text
    assert "ended" in text
