"""The examples, run as a reader would run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = {"predict.sh": "sh", "predict.py": sys.executable, "predict.mjs": "node"}


@pytest.mark.parametrize("name", sorted(file.name for file in EXAMPLES.iterdir() if file.is_file()))
def test_an_example(name: str, api: str, samples: Path) -> None:
    program = shutil.which(PROGRAMS[name])
    needs = "curl" if name == "predict.sh" else program
    if program is None or needs is None or shutil.which(needs) is None:
        pytest.skip(f"needs {PROGRAMS[name]} and curl")
    done = subprocess.run(
        [program, str(EXAMPLES / name), str(samples / "photographer.jpg"), api],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent / "src")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "0." in done.stdout  # a score
