"""Two gloo processes against one: the same curve, the same weights, each other's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from safetensors.torch import load_file  # noqa: E402

from cliphar.errors import ClipharError  # noqa: E402
from cliphar.training import first_speaks  # noqa: E402

WORKER = Path(__file__).with_name("distributed_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def work(folder: Path, kind: str, name: str, stop_after: int = 0) -> dict[str, Any]:
    """Run the toy alone, or as two processes of torchrun; what the first one wrote."""
    alone = [sys.executable]
    command = [*(alone if kind == "one" else LAUNCH), str(WORKER), kind, str(folder), name, str(stop_after)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    written: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return written | {"weights": load_file(folder / f"{name}.st")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work(tmp_path_factory.mktemp("alone"), "one", "alone")


def same_weights(these: dict[str, Any], those: dict[str, Any]) -> None:
    assert these.keys() == those.keys()
    for name, weight in these.items():
        torch.testing.assert_close(weight, those[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(alone: dict[str, Any], tmp_path: Path, kind: str) -> None:
    both = work(tmp_path, kind, kind)
    assert len(alone["curve"]) == 9
    assert alone["curve"][-1] < alone["curve"][0]
    assert both["curve"] == pytest.approx(alone["curve"], rel=1e-4)
    same_weights(both["weights"], alone["weights"])
    assert both["worst"] < 1e-6
    assert both["patience_s"] == 86400


@pytest.mark.parametrize(("first", "second"), [("fsdp", "one"), ("ddp", "fsdp")])
def test_a_checkpoint_is_taken_up_by_the_other_kind(
    alone: dict[str, Any], tmp_path: Path, first: str, second: str
) -> None:
    begun = work(tmp_path, first, "run", stop_after=4)
    shutil.copy(tmp_path / "run.checkpoint", tmp_path / "again.checkpoint")
    ended = work(tmp_path, second, "again")
    assert begun["curve"] + ended["curve"] == pytest.approx(alone["curve"], rel=1e-4)
    same_weights(ended["weights"], alone["weights"])


@pytest.mark.parametrize(
    ("override", "said"), [("train.epoch=1", "did you mean epochs?"), ("data.source=nowhere", "no data at nowhere")]
)
def test_what_is_wrong_is_said_once(clean_env: dict[str, str], tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text("{method: full, name: it, output: it, data: {source: photos}}")
    command = [*LAUNCH, "-m", "cliphar", "train", "recipe.yaml", override]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_env, cwd=tmp_path, timeout=180, check=False
    )
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("cliphar: "))
    assert said in line
    assert "[rank1]" not in done.stderr  # the trace of one that waited for the first


def test_a_process_that_is_gone_is_told_in_a_line() -> None:
    with pytest.raises(ClipharError, match=r"is gone \(Connection closed by peer \[::1\]:4\); see"), first_speaks():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4. This is typically")
