"""Runs recorded in a real MLflow store, by a real MLflow server that goes away, and in W&B's offline files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("torch", reason="training needs the [train] extra")
pytest.importorskip("mlflow", reason="tracking needs the [train] extra")

from mlflow.tracking import MlflowClient

from cliphar.errors import UsageError
from cliphar.training._tracking import BackgroundTracker, Point, open_tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers themselves


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for label in ("jumping", "running"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            noise = Image.fromarray(random.integers(0, 255, (9, 9, 3), np.uint8)).resize((80, 80))
            noise.save(tmp_path / "data" / label / f"{i}.png")
    data = {"source": str(tmp_path / "data"), "val": 0.25, "test": 0.25}
    tree = {"method": "zero-shot", "name": "told", "output": "runs/told", "data": data, "track": ["mlflow"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_a_run_lies_in_the_store_with_its_bundle_and_report(
    recipe: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cliphar", "train", str(recipe)],
        capture_output=True,
        text=True,
        env={k: v for k, v in clean_env.items() if not k.startswith("MLFLOW")},
        cwd=tmp_path,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no longer" not in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db", f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("cliphar")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "zero-shot"
    assert run.data.params["data.val"] == "0.25"
    assert {"known/top1", "start/top1", "system/cpu_percent"} <= set(run.data.metrics)
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {"bundle", "told.html"}
    (version,) = client.search_model_versions("name='told'")
    assert version.run_id == run.info.run_id
    folder = Path(client.download_artifacts(run.info.run_id, "bundle", str(tmp_path)))
    assert (folder / "bundle.json").read_bytes() == (tmp_path / "runs" / "told" / "bundle.json").read_bytes()
    assert "<svg" in (tmp_path / "runs" / "told.html").read_text(encoding="utf-8")


def test_two_that_make_the_store_at_once_are_both_kept(clean_env: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from cliphar.training._tracking import open_tracker as o; import sys; "
        "name = sys.argv[1]; o(['mlflow'], name, Path(), print, Path(name)).close()"
    )
    env = {k: v for k, v in clean_env.items() if not k.startswith("MLFLOW")}
    odd = tmp_path / "a?%41"
    odd.mkdir()
    both = [
        subprocess.Popen([sys.executable, "-c", code, name], cwd=odd, env=env, stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    assert [process.communicate(timeout=180)[0] for process in both] == [b"", b""]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, *store], stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        for _ in range(720):
            with suppress(URLError, ConnectionError, TimeoutError):
                urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.25)
        else:
            pytest.fail((tmp_path / "server.log").read_text())
        yield f"http://127.0.0.1:{port}", process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


_WORKER = """
import os, signal, sys
from pathlib import Path
from cliphar.training import Stopped, Surroundings, load_recipe, train

def on_step(report):
    if report.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGTERM)

def log(line):
    print(line, flush=True)

try:
    train(load_recipe(Path(sys.argv[1]), tuple(sys.argv[3:])), Surroundings(resume=True, log=log, on_step=on_step))
except Stopped as stopped:
    sys.exit(stopped.status)
"""


def test_a_stopped_training_goes_on_in_its_run(recipe: Path, clean_env: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    loop = {"epochs": 3, "batch_size": 6, "size": 32}
    more = {"method": "full", "train": loop, "wise": {"shares": [1.0]}, "track": ["mlflow", "wandb"]}
    recipe.write_text(yaml.safe_dump(tree | more), encoding="utf-8")
    env = {key: value for key, value in clean_env.items() if not key.startswith(("MLFLOW", "WANDB"))}
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db", f"sqlite:///{tmp_path}/runs/mlflow.db")

    def go_on(at: int, *overrides: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, recipe.name, str(at), *overrides],
            capture_output=True,
            text=True,
            env=env | {"WANDB_MODE": "offline"},
            cwd=tmp_path,
            timeout=600,
            check=False,
        )
        assert done.returncode in (0, 128 + signal.SIGTERM), done.stderr
        assert "is no longer written to" not in done.stdout
        assert "wandb" not in done.stdout + done.stderr
        return done.returncode, done.stdout

    def runs() -> list[tuple[str, list[int]]]:
        found = client.search_runs(["1"], order_by=["attributes.start_time"])
        loss = [client.get_metric_history(run.info.run_id, "train/loss") for run in found]
        return [(run.info.status, [m.step for m in its]) for run, its in zip(found, loss, strict=True)]

    assert go_on(2)[0] == 128 + signal.SIGTERM
    assert runs() == [("KILLED", [1, 2])]
    status, said = go_on(3, "description=as it went on", f"data.cache={tmp_path / 'moved'}")
    assert (status, "no longer has" in said) == (128 + signal.SIGTERM, False)
    assert runs() == [("KILLED", [1, 2, 3])]
    before = client.search_runs(["1"])[0].info
    tracker = open_tracker(["mlflow"], "told", tmp_path / "runs", print, tmp_path / "runs" / "told.checkpoint.runs")
    tracker.close()  # as where --resume is refused: nothing has run
    after = client.search_runs(["1"])[0].info
    assert (after.status, after.end_time) == (before.status, before.end_time)
    client.delete_run(before.run_id)
    status, said = go_on(4)
    (line,) = (line for line in said.splitlines() if "no longer has" in line)
    assert line.startswith("MLflow no longer has the run")
    assert runs() == [("KILLED", [4])]
    assert go_on(0)[0] == 0
    ((ended, steps),) = runs()
    assert (ended, steps) == ("FINISHED", list(range(4, steps[-1] + 1)))
    assert client.search_runs(["1"])[0].data.params["train.epochs"] == "3"
    assert not list((tmp_path / "runs").glob("*.checkpoint*"))
    folders = list((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 4
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1


def test_a_server_that_goes_away_does_not_stop_the_run(
    server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    lines: list[str] = []
    (tmp_path / "ids").write_text("{")  # what names the runs is damaged
    tracker = open_tracker(["mlflow"], "gone", tmp_path / "runs", lines.append, tmp_path / "ids")
    tracker.log_params({"train": {"lr": 0.1}})
    tracker.log_metrics({"train/loss": 3.0}, 1)
    client = MlflowClient(address, address)
    for _ in range(480):
        runs = client.search_runs(["0", "1"])
        if runs and "train/loss" in runs[0].data.metrics:
            break
        time.sleep(0.25)
    assert runs[0].data.params == {"train.lr": "0.1"}
    assert runs[0].data.metrics["train/loss"] == 3.0
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    began = time.monotonic()
    for step in range(2, 500):
        tracker.log_metrics({"train/loss": 1.0}, step)
    assert time.monotonic() - began < 120  # to wait for each of the server's refusals takes over 8 minutes
    tracker.close()
    assert len(lines) == 1
    assert lines[0].startswith("MLflow is no longer written to, training goes on: ")


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines: list[str] = []
    tracker = open_tracker(["wandb"], "off", tmp_path, lines.append, tmp_path / "ids")
    tracker.log_params({"method": "full", "train": {"lr": 0.1}})
    for step in range(1, 4):
        tracker.log_metrics({"train/loss": 1.0 / step}, step)
    (tmp_path / "report.html").write_text("<p>fine</p>", encoding="utf-8")
    tracker.log_artifact(tmp_path / "report.html")
    tracker.close()
    assert lines == []
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # its service closes the file when it gets round to it
    while any(word not in record.read_bytes() for word in (b"train/loss", b"report")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


class _Broken:
    name = "broken"

    def params(self, params: Mapping[str, Any]) -> None:
        raise OSError("no\nroom")

    points = artifact = end = params


class _Kept:
    name = "kept"

    def __init__(self) -> None:
        self.got: list[Point] = []
        self.ended: list[str] = []

    def params(self, params: Mapping[str, Any]) -> None:
        assert params == {"a.b": 1, "c": 2}

    def points(self, points: Sequence[Point]) -> None:
        self.got += points

    def artifact(self, path: Path) -> None:
        pass

    def end(self, how: str) -> None:
        self.ended.append(how)


def test_what_fails_is_told_once_and_the_other_goes_on(tmp_path: Path) -> None:
    kept, lines = _Kept(), list[str]()

    def absent() -> _Kept:
        raise ConnectionError("nobody there")

    opening = {"absent": absent, "broken": _Broken, "kept": lambda: kept}
    tracker = BackgroundTracker(opening, lines.append)  # type: ignore[arg-type]
    tracker.log_params({"a": {"b": 1}, "c": 2})
    for step in range(100):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_artifact(tmp_path)
    tracker.close()
    assert [line.partition(":")[2] for line in lines] == [" nobody there", " no room"]
    assert [step for name, _, step, _ in kept.got if name == "loss"] == list(range(100))
    assert kept.ended == ["FINISHED"]


def test_a_tracker_that_is_not_installed_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="cliphar\\[train\\]"):
        open_tracker(["mlflow"], "x", tmp_path, print, tmp_path / "ids")
