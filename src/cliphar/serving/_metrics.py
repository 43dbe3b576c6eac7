"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

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
        self._pending = Gauge("cliphar_queue_images", "Photos that wait or are worked on.", registry=self.registry)
        self._size = Gauge("cliphar_queue_size", "Photos that may wait.", registry=self.registry)
        self._model = Info("cliphar_model", "The model that answers.", registry=self.registry)

    def watch(self, engine: Engine, recognizer: Recognizer) -> None:
        """Show the queue's state and what model answers."""
        self._pending.set_function(lambda: engine.pending)
        self._size.set(engine.queue_size)
        self._model.info(
            {"name": recognizer.bundle.info.name, "runtime": recognizer.runtime.name, "version": __version__}
        )

    def observe(self, stage: str, value: float) -> None:
        """See :data:`cliphar.serving._engine.Observer`."""
        if stage == "batch":
            self.batch.observe(value)
        else:
            self.stages.labels(stage).observe(value)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)
