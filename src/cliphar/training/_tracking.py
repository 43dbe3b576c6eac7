"""What a run tells whoever keeps a record of it: MLflow and Weights & Biases behind one tracker, which never makes the
training wait or fail."""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote
from uuid import uuid4

from cliphar.bundle import alone, write_whole
from cliphar.errors import UsageError, reason_of

if TYPE_CHECKING:
    from mlflow.entities import Run

__all__ = ["BackgroundTracker", "MlflowSink", "NoTracker", "Sink", "Tracker", "WandbSink", "open_tracker"]

_SYSTEM_EVERY_S = 10.0
_CLOSE_S = 120.0
_FORGOTTEN = "{} no longer has the run {} that was stopped; what follows is a new one"
Log = Callable[[str], None]
Point = tuple[str, float, int, float]  # name, value, step, seconds since 1970


class Tracker(Protocol):
    """Keeps parameters, metrics and files of a run. None of its methods may fail the run."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """The recipe and what it ran on; nested mappings are allowed."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values after so many steps of the optimiser; names such as ``train/loss`` and ``val/score``."""
        ...

    def log_artifact(self, path: Path) -> None:
        """A file, or a folder such as the bundle."""
        ...

    def close(self, *, stopped: bool = False) -> None:
        """The run is over, or was ``stopped`` by a signal."""
        ...


class NoTracker:
    """Keeps nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""

    def log_artifact(self, path: Path) -> None:
        """See :class:`Tracker`."""

    def close(self, *, stopped: bool = False) -> None:
        """See :class:`Tracker`."""


class Sink(Protocol):
    """Where a run is recorded. Called from one thread, in order; what it raises is told once and then it is let go."""

    name: str
    run_id: str

    def params(self, params: Mapping[str, Any]) -> None:
        """The recipe's settings, flat."""
        ...

    def points(self, points: Sequence[Point]) -> None:
        """Values of metrics."""
        ...

    def artifact(self, path: Path) -> None:
        """A file, or the folder of the finished bundle."""
        ...

    def end(self, how: str) -> None:
        """The run is over: FINISHED, FAILED, or KILLED by a signal."""
        ...


class MlflowSink:
    """An MLflow run: at MLFLOW_TRACKING_URI, else in ``home``/mlflow.db.

    The experiment is MLFLOW_EXPERIMENT_NAME, else ``cliphar``. The run is that of ``run_id``, where it is still there.
    """

    name = "MLflow"

    def __init__(self, run_name: str, home: Path, run_id: str | None, log: Log) -> None:
        # an absent server is found out in seconds, not the half hour that MLflow would try for
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import logging

        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        place = None
        if not uri:
            home.mkdir(parents=True, exist_ok=True)
            # else a path is cut at its ?, and %41 is read as A
            path = re.sub(r"[?]|%(?=[0-9a-fA-F]{2})", lambda odd: quote(odd[0]), str((home / "mlflow.db").resolve()))
            uri = f"sqlite:///{path}"
            place = (home / "mlflow").resolve().as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cliphar"
        kind = {"mlflow.experimentKind": "custom_model_development"}  # else its pages are those for language models
        with alone(home) if place else nullcontext():  # of two that make the same database at once, MLflow fails one
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name, place, tags=kind)
        self._model = run_name
        source = {"mlflow.source.name": "cliphar train"}
        known = None if run_id is None else self._known(run_id)
        if run_id is not None and known is None:
            log(_FORGOTTEN.format(self.name, run_id))
        self._run = known or self._client.create_run(number, tags=source, run_name=run_name)
        self.run_id = self._run.info.run_id
        self._was = known.info if known and known.info.status != "RUNNING" else None  # until something is trained

    def _known(self, run_id: str) -> Run | None:
        """A run that was stopped, running again."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.info.lifecycle_stage != "active":  # deleted, and nothing can be added to it
            return None
        self._client.update_run(run_id, "RUNNING")
        return run

    def params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Sink`; a run that goes on has them, and MLflow refuses one that changed, such as a path."""
        from mlflow.entities import Param

        if self._run.data.params:
            return
        texts = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for at in range(0, len(texts), 100):  # what one request may hold
            self._client.log_batch(self.run_id, params=texts[at : at + 100])

    def points(self, points: Sequence[Point]) -> None:
        """See :class:`Sink`."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(when * 1000), step) for name, value, step, when in points]
        if any(metric.step for metric in metrics):
            self._was = None
        for at in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[at : at + 1000])

    def artifact(self, path: Path) -> None:
        """See :class:`Sink`; a bundle also becomes a version of the registered model of its recipe's name."""
        if path.is_file():
            self._client.log_artifact(self.run_id, str(path))
            return
        from mlflow.exceptions import MlflowException

        self._client.log_artifacts(self.run_id, str(path), "bundle")
        try:
            self._client.get_registered_model(self._model)
        except MlflowException:
            self._client.create_registered_model(self._model)
        self._client.create_model_version(self._model, f"{self._run.info.artifact_uri}/bundle", run_id=self.run_id)

    def end(self, how: str) -> None:
        """See :class:`Sink`; the words are MLflow's. One that was to go on, and did not, stays as it was."""
        if self._was and how != "FINISHED":
            self._client.set_terminated(self.run_id, self._was.status, self._was.end_time)
        else:
            self._client.set_terminated(self.run_id, how)


class WandbSink:
    """A Weights & Biases run, set by its own variables: WANDB_MODE, WANDB_BASE_URL and so on.

    The project is WANDB_PROJECT, else ``cliphar``. The run is that of ``run_id``, where it was not deleted.
    """

    name = "Weights & Biases"

    def __init__(self, run_name: str, home: Path, run_id: str | None, log: Log) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # its settings' silent lets some lines through
        import wandb

        home.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._model = run_name
        project = os.environ.get("WANDB_PROJECT") or "cliphar"
        begin = partial(wandb.init, project=project, name=run_name, dir=home)
        try:
            self._run = begin(id=run_id, resume="allow") if run_id else begin()
        except wandb.Error as error:
            if run_id is None or "deleted" not in str(error):
                raise
            log(_FORGOTTEN.format(self.name, run_id))
            self._run = begin(id=uuid4().hex)  # without one, wandb tries the last again
        self.run_id = self._run.id
        self._run.define_metric("*", step_metric="step")

    def params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Sink`; a run that goes on has them."""
        if not self._run.resumed:
            self._run.config.update(dict(params))  # type: ignore[no-untyped-call]

    def points(self, points: Sequence[Point]) -> None:
        """See :class:`Sink`."""
        by_step: dict[int, dict[str, float]] = {}
        for name, value, step, _ in points:
            if not name.startswith("system/"):  # it measures the machine itself
                by_step.setdefault(step, {})[name] = value
        for step, values in by_step.items():
            self._run.log(values | {"step": step})

    def artifact(self, path: Path) -> None:
        """See :class:`Sink`."""
        artifact = self._wandb.Artifact(
            self._model if path.is_dir() else path.stem, "model" if path.is_dir() else "report"
        )
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self._run.log_artifact(artifact)

    def end(self, how: str) -> None:
        """See :class:`Sink`."""
        self._run.finish(exit_code=0 if how == "FINISHED" else 1)


class BackgroundTracker:
    """A tracker that hands everything to sinks on a thread of its own.

    Args:
        open_sinks: makes the sinks, by name, on that thread, since even that may wait for a server.
        log: is told, in one line, of a sink that fails; the others and the training go on.
    """

    def __init__(self, open_sinks: Mapping[str, Callable[[], Sink]], log: Log) -> None:
        self._log = log
        self._open = dict(open_sinks)
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._step = 0
        self._done = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""
        self._queue.put(("params", _flat(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        self._step = step
        now = time.time()
        self._queue.put(("points", [(name, float(value), step, now) for name, value in metrics.items()]))

    def log_artifact(self, path: Path) -> None:
        """See :class:`Tracker`; a folder is the finished bundle."""
        self._done = self._done or path.is_dir()
        self._queue.put(("artifact", path))

    def close(self, *, stopped: bool = False) -> None:
        """Wait, within bounds, until all is written; the run counts as finished if it logged a bundle."""
        self._queue.put(("end", "FINISHED" if self._done else "KILLED" if stopped else "FAILED"))
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._log(f"tracking was not done {_CLOSE_S:.0f} s after the end; it is left behind")

    def _work(self) -> None:
        sinks: list[Sink] = []
        for name, opening in self._open.items():
            try:
                sinks.append(opening())
            except Exception as error:
                self._tell(name, error)
        measured = 0.0
        points: list[Point] = []
        while True:
            kind, value = self._next()
            if kind == "points":
                points += value
            if time.monotonic() - measured > _SYSTEM_EVERY_S:
                measured = time.monotonic()
                points += [(name, number, self._step, time.time()) for name, number in _system().items()]
            # values are gathered as long as more of them wait: one request holds many
            if points and (kind != "points" or self._queue.empty()):
                self._give(sinks, "points", points)
                points = []
            if kind in ("params", "artifact", "end"):
                self._give(sinks, kind, value)
            if kind == "end":
                return

    def _next(self) -> tuple[str, Any]:
        try:
            return self._queue.get(timeout=_SYSTEM_EVERY_S)
        except queue.Empty:
            return "idle", None

    def _give(self, sinks: list[Sink], kind: str, value: Any) -> None:
        for sink in list(sinks):
            try:
                getattr(sink, kind)(value)
            except Exception as error:
                sinks.remove(sink)
                self._tell(sink.name, error)

    def _tell(self, name: str, error: Exception) -> None:
        self._log(f"{name} is no longer written to, training goes on: {reason_of(error)}")


def open_tracker(kinds: Sequence[str], run_name: str, home: Path, log: Log, runs: Path) -> BackgroundTracker:
    """A tracker for ``mlflow``, ``wandb`` or both; local files go to ``home``.

    ``runs`` is a file that names the runs that are written to: where it is there already, those go on.

    Raises:
        UsageError: one of them is not installed.
    """
    import importlib.util

    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise UsageError(f"tracking with {kind} needs a package; run: pip install 'cliphar[train]'")
    sinks: dict[str, type[MlflowSink] | type[WandbSink]] = {"mlflow": MlflowSink, "wandb": WandbSink}
    ids: dict[str, str] = {}
    with suppress(FileNotFoundError, ValueError):  # of a damaged one, training does not fail: new runs begin
        ids = json.loads(runs.read_bytes())

    def opening(kind: str) -> Sink:
        sink = sinks[kind](run_name, home, ids.get(kind), log)
        ids[kind] = sink.run_id
        write_whole(runs, json.dumps(ids).encode())
        return sink

    return BackgroundTracker({sinks[kind].name: partial(opening, kind) for kind in kinds}, log)


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _system() -> dict[str, float]:
    """Load of the machine and size of this process: percent and MiB."""
    import psutil
    import torch

    found = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/process_mib": psutil.Process().memory_info().rss / 2**20,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["system/gpu_memory_percent"] = 100 * (1 - free / total)
    return found
