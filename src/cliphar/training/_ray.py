"""The same train function on a Ray cluster: Ray starts the processes, and torch.distributed joins them.

Liaw et al., "Tune: a research platform for distributed model selection and training", 2018; Ray Train's TorchTrainer.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from cliphar.bundle import Bundle, read_bundle
from cliphar.errors import ClipharError, UsageError
from cliphar.training._loop import Surroundings
from cliphar.training._method_recipe import GradientRecipe
from cliphar.training._recipe import Recipe
from cliphar.training._train import refuse_several, train

__all__ = ["train_on_ray"]


def _work(settings: dict[str, Any]) -> None:
    logging.getLogger().setLevel(logging.WARNING)  # Ray's INFO shows every step of the ONNX exporter
    os.chdir(settings["folder"])
    train(settings["recipe"], Surroundings(resume=settings["resume"], log=_log))


def _log(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # Ray Train's print would show it twice
    sys.stdout.flush()


def train_on_ray(recipe: Recipe, workers: int, *, resume: bool = False) -> Bundle:
    """Train by ``recipe`` in ``workers`` processes of the cluster at RAY_ADDRESS, else of a Ray started here.

    The recipe's data, output and working directory must be at the same place on every node. Each process gets a GPU
    where the cluster has any.

    Raises:
        UsageError: ray is not installed, or the method takes one process.
        ClipharError: the training failed; what ``train`` raised, else what Ray says.
    """
    refuse_several(recipe, workers, "--ray")
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UsageError("training on Ray needs a package; run: pip install 'cliphar[ray]'") from error
    started = not ray.is_initialized()
    try:
        if started:
            ours = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=True, include_dashboard=False)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, ours)  # Ray's own prints a trace and aborts
        on_cpu = isinstance(recipe, GradientRecipe) and recipe.train.device == "cpu"
        use_gpu = not on_cpu and ray.cluster_resources().get("GPU", 0) >= workers  # type: ignore[no-untyped-call]
        with tempfile.TemporaryDirectory() as storage:
            TorchTrainer(
                _work,
                train_loop_config={
                    "recipe": recipe,
                    "resume": resume,
                    "folder": str(Path.cwd()),
                },
                torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
                run_config=RunConfig(name=recipe.name, storage_path=storage),
            ).fit()
    except SystemExit as stopped:  # Ray Train takes Ctrl-C, and then calls it a success
        raise KeyboardInterrupt from stopped
    except Exception as error:
        if isinstance(error, ClipharError):
            raise
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, ClipharError):
                raise failure from error
        cause = str(error).strip().splitlines()
        raise ClipharError(f"the training on Ray failed: {cause[-1] if cause else type(error).__name__}") from error
    finally:
        if started:
            ray.shutdown()
    return read_bundle(recipe.output)
