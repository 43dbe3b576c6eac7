"""Ray, started here with two CPUs: photos answered in parts, and a training in two processes."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from serving_process import free_port

pytest.importorskip("ray", reason="needs the [ray] extra")
parquet = pytest.importorskip("pyarrow.parquet")

Done = subprocess.CompletedProcess[str]
Cli = Callable[..., Done]


def finished(command: list[str], env: dict[str, str], cwd: Path | None = None) -> Done:
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=900, check=False)


@pytest.fixture
def cli(clean_env: dict[str, str], tmp_path: Path) -> Cli:
    def run(*arguments: object) -> Done:
        command = [sys.executable, "-m", "cliphar", *map(str, arguments)]
        quiet = {"RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1", "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2})}
        return finished(command, clean_env | quiet, tmp_path)

    return run


def test_photos_and_shards_are_answered_in_parts_that_are_kept(cli: Cli, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for photo in photos[:3]:
        shutil.copy(photo, tmp_path / "photos")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no photo")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(photos[0], "inside.jpg")
        shard.add(__file__, "notes.txt")
        shard.add(__file__, "no.jpg")
        shard.add(__file__, "._inside.jpg")
    whole = (tmp_path / "shard.tar").read_bytes()
    second = whole.index(b"notes.txt")
    (tmp_path / "bad.tar").write_bytes(whole[:second] + b"?" + whole[second + 1 :])
    ask = ("predict", "photos", "shard.tar", "bad.tar", "--labels", "smiling,riding a bike", "--ray", "--out", "out")
    first = cli(*ask)
    assert first.returncode == 1, first.stderr
    # Ray's too; in any order
    said = sorted(line for line in first.stderr.splitlines() if line.startswith("cliphar: "))
    assert len(said) == 3, first.stderr
    assert "bad.jpg" in said[1]
    assert "bad.tar is damaged or cut short" in said[0]
    assert said[2].startswith("cliphar: shard.tar/no.jpg is not an image")
    assert first.stdout.startswith("4 photos answered in 3 parts")
    out = tmp_path / "out"
    tables = [parquet.read_table(part).to_pylist() for part in sorted(out.iterdir())]
    rows = {row["path"]: row for table in tables for row in table}
    assert len(rows) == 4
    assert "shard.tar/inside.jpg" in rows
    plain = cli("predict", "photos", "--labels", "smiling,riding a bike", "--json")
    for line in plain.stdout.splitlines():
        answer = json.loads(line)
        assert rows[answer["path"]]["label"] == answer["label"]
        assert rows[answer["path"]]["score"] == pytest.approx(answer["score"], abs=1e-4)
    (out / "part-other.parquet").touch()
    kept = {part.name: part.stat().st_mtime_ns for part in out.iterdir()}
    lost = sorted(kept)[0]
    (out / lost).unlink()
    again = cli(*ask)
    assert "in 2 parts in out, 1 parts were there" in again.stdout
    assert "out also holds 1 parts" in again.stderr
    assert {part.name for part in out.iterdir()} == set(kept)
    assert all((out / name).stat().st_mtime_ns == kept[name] for name in kept if name != lost)


def test_the_job_of_the_cluster_file(clean_env: dict[str, str], photos: list[Path], tmp_path: Path) -> None:
    """What deploy/ray.yaml runs, on others' cluster, but for the volume."""
    documents = yaml.safe_load_all((Path(__file__).parent.parent / "deploy" / "ray.yaml").read_text(encoding="utf-8"))
    (spec,) = (one["spec"] for one in documents if one["kind"] == "RayJob")
    assert spec["rayClusterSpec"]["rayVersion"] == version("ray")
    (tmp_path / "photos").mkdir()
    for photo in photos[:2]:
        shutil.copy(photo, tmp_path / "photos")
    port, token = free_port(), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    place = tempfile.mkdtemp(prefix="ray")  # short, for sockets; found by no other test
    own = {"RAY_TMPDIR": place, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "OMP_NUM_THREADS": "1"}
    env = clean_env | token | own | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    start += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    with (tmp_path / "log").open("wb") as log:
        head = subprocess.Popen(start, env=env, stdout=log, stderr=log)
    try:
        command = spec["entrypoint"].replace("/data", str(tmp_path)).split()
        assert command[0] == "cliphar"
        for _ in range(120):
            if b"Ray runtime started" in (tmp_path / "log").read_bytes():
                break
            time.sleep(1)

        def submit(**other: str) -> Done:
            return finished([sys.executable, "-m", *command], env | other)

        stranger = submit(RAY_AUTH_TOKEN=secrets.token_hex(16), RAY_py_gcs_connect_timeout_s="1")
        assert stranger.returncode == 1
        assert stranger.stderr.splitlines()[-1].startswith("cliphar: Failed to connect to Ray cluster at ")
        done = submit()
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("2 photos answered in 1 parts")
        assert head.poll() is None  # the cluster is its owner's to stop
        (part,) = (tmp_path / "answers").iterdir()
        assert parquet.read_table(part).num_rows == 2
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(place, ignore_errors=True)


def test_wrong_calls(cli: Cli, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("{method: gda, name: few, output: runs/few, data: {source: data}}")
    alone = cli("train", "few.yaml", "--ray", "2")
    assert (alone.returncode, alone.stderr) == (2, "cliphar: 'gda' runs in one process; leave --ray out\n")
    for arguments in (("--ray",), ("--ray", "--out", "answers.parquet"), ("--ray", "--out", "out", "--json")):
        done = cli("predict", photos[0], *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_training_in_two_processes(cli: Cli, clean_env: dict[str, str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label, colour in (("jumping", (220, 40, 40)), ("running", (40, 60, 220))):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(10):
            pixels = np.clip(random.normal(colour, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    (tmp_path / "recipe.yaml").write_text(
        "{method: full, name: both, output: runs/both, data: {source: data, val: 0.2, test: 0.2},"
        " train: {epochs: 1, batch_size: 4, size: 64, device: cpu, distributed: fsdp},"
        " contrastive: 0, wise: {shares: [1.0]}}"
    )
    command = [sys.executable, "-m", "cliphar", "train", "recipe.yaml", "--ray", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_env, cwd=tmp_path) as stopped:
        assert any("TrainController" in line for line in stopped.stderr or ())
        stopped.terminate()
        assert stopped.wait(120) == 143
    wrong = cli("train", "recipe.yaml", "--ray", "2", "train.batch_size=3")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("cliphar: train.batch_size 3 is not")
    done = cli("train", "recipe.yaml", "--ray", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "both is ready at runs/both"
    info = json.loads((tmp_path / "runs" / "both" / "bundle.json").read_text(encoding="utf-8"))
    assert info["labels"] == ["jumping", "running"]
    assert info["provenance"]["recipe"]["train"]["distributed"] == "fsdp"
    assert (tmp_path / "runs" / "both.html").is_file()
