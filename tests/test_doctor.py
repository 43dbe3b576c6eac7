"""What cliphar doctor finds, on this machine and on made-up ones."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from cliphar.cli import _doctor


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cliphar", "doctor"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_taken_port_and_too_many_threads_are_told_with_what_mends_them() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(CLIPHAR_PORT=str(port), CLIPHAR_THREADS="4096")
    assert done.returncode == 1
    assert (
        f"port {port}: Address already in use\n     -> if it is not cliphar's: export CLIPHAR_PORT=PORT" in done.stdout
    )
    assert "CLIPHAR_THREADS=4096 is more than" in done.stdout
    assert "-> unset CLIPHAR_THREADS" in done.stdout


def test_a_port_that_is_none_is_told() -> None:
    done = run(CLIPHAR_PORT="http", CLIPHAR_APP_PORT="", TMPDIR="")
    assert done.returncode == 1
    assert "CLIPHAR_PORT=http is no port" in done.stdout
    assert "CLIPHAR_APP_PORT" not in done.stdout  # set but empty is not set
    assert "temporary files are written to /tmp" in done.stdout


def test_the_gpu_s_first_missing_thing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _doctor._gpu(["cpu"], tmp_path)[0] is None
    (tmp_path / "nvidia-smi").touch(0o755)
    assert _doctor._gpu(["cpu"], tmp_path)[0] is False
    (tmp_path / "nvidia0").touch()
    assert "CPU's build" in _doctor._gpu(["cpu"], tmp_path)[1]
    # this machine's build has no CUDA, so running a model with it fails
    assert _doctor._gpu(["cuda", "cpu"], tmp_path)[0] is False
    assert "provider 'cuda'" in _doctor._gpu(["cuda", "cpu"], tmp_path)[1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert _doctor._gpu(["cuda", "cpu"], tmp_path)[2] == "unset CUDA_VISIBLE_DEVICES"


def test_the_warning_that_names_doctor_is_not_given_by_doctor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING, "cliphar.runtime")  # and back at the end
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("cliphar.runtime._onnx._without_nvidia", lambda: False)
    monkeypatch.setattr(_doctor, "_gpu", lambda _: _doctor._cuda())
    with pytest.raises(typer.Exit), pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        _doctor.doctor()
    assert "does not find CUDA's libraries" in capsys.readouterr().out
    assert not caplog.records


def test_folders_that_cannot_be_written_to_are_told() -> None:
    done = run(CLIPHAR_HOME="/proc/models", CLIPHAR_STATE="/proc/state")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for told in ("models are stored in /proc/models: not", "what a service is taught is kept in /proc/state: not"):
        at = next(at for at, line in enumerate(lines) if told in line)
        assert lines[at + 1].startswith("     -> "), done.stdout


@pytest.mark.parametrize(
    ("file", "content", "good", "says"),
    [
        ("memory.max", "268435456", False, "memory: 268 MB may be used; more ends in status 137"),
        ("memory.max", "2147483648", True, "memory: 2147 MB may be used"),
        ("memory.max", "max", True, "memory: as much as the machine has"),
        ("memory/memory.limit_in_bytes", "536870912", True, "memory: 537 MB may be used"),
        ("memory/memory.limit_in_bytes", "9223372036854771712", True, "memory: as much as the machine has"),
    ],
)
def test_the_memory_that_a_container_may_use_is_told(
    tmp_path: Path, file: str, content: str, good: bool, says: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    assert _doctor._memory(tmp_path)[:2] == (good, says)


def test_a_runtime_whose_engine_is_not_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"onnx": "image.onnx", "openvino": "openvino/fp32.xml", "tensorrt": "image.plan", "torchscript": "image.pt"}
    bundle = SimpleNamespace(name="mine", path=Path("mine"), state="here", runtimes=files)
    monkeypatch.setattr("cliphar.bundle.list_models", lambda: [bundle])
    monkeypatch.setattr("cliphar.bundle.find_bundle", lambda _: bundle)
    monkeypatch.setattr(_doctor, "find_spec", lambda name: name == "onnxruntime" or None)
    monkeypatch.setattr(_doctor, "_in_container", lambda: False)
    monkeypatch.delenv("MODEL_PATH", raising=False)
    assert list(_doctor._models())[1:] == [
        (
            None,
            "model mine: nothing here runs its openvino",
            "pip install 'cliphar[openvino]', or the image built with VARIANT=openvino",
        ),
        (None, "model mine: nothing here runs its tensorrt", "the image built with VARIANT=tensorrt"),
        (
            None,
            "model mine: nothing here runs its torchscript",
            "pip install 'cliphar[train]', or the image for training",
        ),
    ]


def test_few_threads_are_told(tmp_path: Path) -> None:
    assert not list(_doctor._threads(tmp_path))
    for file, content, bad in ("pids.max", "max", 0), ("pids.max", "256", 0), ("pids/pids.max", "10", 1):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
        told = list(_doctor._threads(tmp_path))
        assert len(told) == bad
    assert told[0][:2] == (False, "threads: 10 may run at a time, those of all processes")


def test_a_volume_of_another_user_is_told_with_that_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_doctor, "_in_container", lambda: True)
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert _doctor._folder("", tmp_path, "", "-v x:/models")[2] == f"docker run -u {os.getuid()} ..., or another volume"
    assert _doctor._folder("", tmp_path / "none", "", "-v x:/models")[2] == "docker run -v x:/models ..."
