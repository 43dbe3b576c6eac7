"""What Prometheus is told."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from cliphar._version import __version__
from cliphar.recognizer import Recognizer
from cliphar.serving._engine import Engine

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and histograms of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cliphar_requests", "Requests by route and status.", ["method", "route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "cliphar_request_seconds",
            "Time from request to answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "cliphar_stage_seconds",
            "Time of each stage: queue and decode of a photo, model of a batch.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "cliphar_batch_images",
            "Photos the model was given at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.kept = Counter(
            "cliphar_kept_images", "Photos answered from an embedding that was kept.", registry=self.registry
        )
        self._pending = Gauge(
            "cliphar_queue_images",
            "Photos that wait or are worked on.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._size = Gauge(
            "cliphar_queue_size", "Photos that may wait.", registry=self.registry, multiprocess_mode="livesum"
        )
        self._model = Gauge(
            "cliphar_model_info",
            "The model that answers.",
            ["name", "runtime", "version"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._shown: tuple[str, ...] = ()

    def watch(self, engine: Engine, recognizer: Recognizer) -> None:
        """Show what model answers, and the length of its queue."""
        self._size.set(engine.queue_size)
        if self._shown:
            self._model.labels(*self._shown).set(0)
        self._shown = (recognizer.bundle.info.name, recognizer.runtime.name, __version__)
        self._model.labels(*self._shown).set(1)

    def observe(self, stage: str, value: float) -> None:
        """See :data:`cliphar.serving._engine.Observer`."""
        if stage == "batch":
            self.batch.observe(value)
        elif stage == "pending":
            self._pending.inc(value)
        elif stage == "kept":
            self.kept.inc(value)
        else:
            self.stages.labels(stage).observe(value)

    def render(self) -> bytes:
        """The text format; of all workers together where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
