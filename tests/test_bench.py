from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from cliphar.bench import Bench, Row, _bench, count_flops, plot_bench, run_bench
from cliphar.bundle import find_bundle, packaged
from cliphar.cli._bench import bench
from cliphar.errors import UsageError
from cliphar.export import float_graph
from serving_process import read_terminal


@pytest.fixture(scope="module")
def result() -> Bench:
    return run_bench(find_bundle(packaged("mini")), batches=(1, 2), threads=(1,), seconds=0.2)


def test_half_precision_in_pytorch() -> None:
    runtimes = ("pytorch", "pytorch-fp16")
    rows = run_bench(find_bundle(packaged("mini")), runtimes=runtimes, batches=(1,), seconds=0.1).rows
    assert [(row.runtime, row.file_mib, row.accuracy) for row in rows] == [(name, 0.0, None) for name in runtimes]


def test_every_runtime_at_every_batch(result: Bench) -> None:
    names = (*_bench.pytorch_here(), "onnx", "onnx-int8")
    assert {(row.runtime, row.batch) for row in result.rows} == {(n, b) for n in names for b in (1, 2)}
    assert result.skipped == {}
    for row in result.rows:
        assert row.images_per_s > 0
        assert row.bytes_images_per_s > 0
        assert 0 < row.p50_ms <= row.p95_ms <= row.p99_ms
        assert row.memory_mib > 20
        assert row.peak_share is not None
        assert row.peak_share > 0
    assert [row.speedup for row in result.rows if row.runtime == "pytorch"] == [1.0, 1.0]


def test_serving_alone_is_what_a_runtimes_memory_is_of(result: Bench) -> None:
    memory = {row.runtime: row.memory_mib for row in result.rows}
    assert memory["onnx"] < memory["pytorch"]


def test_the_work_of_a_photo() -> None:
    # EfficientNet-Lite1 is published with 631 M multiply-adds at 240 pixels
    flops = count_flops(float_graph(find_bundle(packaged("mini"))), 240)
    assert flops == pytest.approx(2 * 631e6, rel=0.1)


def test_a_picture(result: Bench, tmp_path: Path) -> None:
    plot_bench(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot write"):
        plot_bench(result, tmp_path / "bench.nonsense")


def test_a_picture_has_a_bar_a_runtime_with_its_speed_and_accuracy(tmp_path: Path) -> None:
    row = Row("onnx", 8, 2, 100.0, 1, 1, 1, 50.0, None, None, 0.1, 100, 5, 0.889)
    speeds = {"onnx": 98, "onnx-fp16": 100, "onnx-fp32": 105, "openvino": 106, "openvino-int8": 540, "pytorch": 24}
    rows = [replace(row, runtime=name, images_per_s=speed) for name, speed in speeds.items()]
    plot_bench(Bench("mini", None, {}, [*rows[:-1], replace(rows[-1], accuracy=None)]), tmp_path / "bench.svg")
    picture = (tmp_path / "bench.svg").read_text()
    for text in (*speeds, "540, top-1 0.889", "106, top-1 0.889", "24"):
        assert f"<!-- {text} -->" in picture


def test_a_worker_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = _bench._Worker.ask

    def killed(worker: _bench._Worker, *request: object) -> object:
        if request[0] == "bytes":
            worker.process.kill()  # as the kernel does if memory is full
        return ask(worker, *request)

    monkeypatch.setattr(_bench._Worker, "ask", killed)
    with pytest.raises(UsageError, match=r"onnx ended while it was measured \(status -9\)"):
        run_bench(find_bundle(packaged("mini")), runtimes=["onnx"], batches=(1,), seconds=0.1)


@pytest.mark.parametrize("after", ["starting", "turn 1"])
def test_ctrl_c_leaves_no_worker_and_nothing_to_read(clean_env: dict[str, str], after: str) -> None:
    command = [sys.executable, "-m", "cliphar", "bench", "mini", "--runtime", "onnx,onnx-int8", "--seconds", "60"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_env, start_new_session=True
    ) as running:
        assert running.stderr is not None
        while not running.stderr.readline().startswith(after):
            pass
        time.sleep(0.3)  # into the imports of a worker
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
        assert "Traceback" not in running.stderr.read()
    assert running.returncode == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(running.pid, 0)
            time.sleep(0.1)


def test_a_runtime_that_the_bundle_lacks() -> None:
    with pytest.raises(UsageError, match="has no runtime 'abacus'"):
        run_bench(find_bundle(packaged("mini")), runtimes=["abacus"])


def test_runtimes_alone_need_neither_torch_nor_onnx(run_python: Callable[[str], str]) -> None:
    code = """
import sys
if __name__ == "__main__":
    sys.modules["torch"] = sys.modules["onnx"] = None
    from cliphar.bench import run_bench
    from cliphar.bundle import find_bundle
    bench = run_bench(find_bundle("mini"), runtimes=["onnx"], batches=[1], seconds=0.1)
    print(bench.rows[0].images_per_s > 0, bench.gflop)
"""
    assert run_python(code).split() == ["True", "None"]


def test_the_command(clean_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cliphar", "bench", "mini", "--runtime", "onnx", "--batch"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, env=clean_env, timeout=120, check=False
        )

    done = run("1", "--seconds", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["runtime"] for row in json.loads(done.stdout)["rows"]] == ["onnx"]
    for wrong in (run("none"), run("1", "--plot", "none/x.png")):
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.startswith(("cliphar: --batch 'none' is not numbers", "cliphar: cannot write none/x.png"))


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_table_is_no_wider_than_the_terminal(clean_env: dict[str, str]) -> None:
    import pty

    outside, inside = pty.openpty()
    command = [sys.executable, "-m", "cliphar", "bench", "mini", "--runtime", "onnx", "--seconds", "0.1"]
    subprocess.run(command, stdout=inside, env=clean_env | {"COLUMNS": "80"}, timeout=120, check=True)
    os.close(inside)
    lines = read_terminal(outside).splitlines()
    assert "accuracy" in lines[-3]
    assert max(map(len, lines)) <= 80


def test_what_a_plot_lacks_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib"):
        bench("none", plot=tmp_path / "x.png")
