"""Measure runtimes side by side: in turns, within one run, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cliphar.bench._flops import count_flops
from cliphar.bench._worker import EAGER, PYTORCH, serve
from cliphar.bundle import Bundle
from cliphar.errors import UsageError
from cliphar.runtime import cpu_quota

if TYPE_CHECKING:
    from cliphar.export import Proof

__all__ = ["Bench", "Row", "run_bench"]

_ROUNDS = 3
_Key: TypeAlias = tuple[str, int, int]  # runtime, threads, batch


@dataclass(frozen=True)
class Row:
    """One runtime at one batch size and number of threads.

    ``speedup`` is over PyTorch eager at the same batch and threads, ``peak_share`` the part of the processor's measured
    float32 matrix-product peak that is reached (an 8-bit or bfloat16 runtime may exceed 1), ``bytes_images_per_s``
    from JPEG files of 640x480 in memory. ``accuracy`` is top-1, 0..1. None where there is nothing to compare with.
    """

    runtime: str
    batch: int
    threads: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    bytes_images_per_s: float
    speedup: float | None
    peak_share: float | None
    load_s: float
    memory_mib: float
    file_mib: float
    accuracy: float | None


@dataclass(frozen=True)
class Bench:
    """All rows; ``gflop`` is the work of one photo, ``peak_gflops`` by threads the matrix-product peak (both known only
    where PyTorch is measured too), ``skipped`` why a runtime was left out."""

    model: str
    gflop: float | None
    peak_gflops: dict[int, float]
    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Worker:
    name: str
    threads: int
    pipe: Connection
    process: Any
    load_s: float

    def ask(self, *request: Any) -> Any:
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise UsageError(
                f"{self.name} ended while it was measured (status {self.process.exitcode}); if the memory was full, "
                "measure fewer at once with --runtime, or a smaller --batch"
            ) from error

    def stop(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_bench(
    bundle: Bundle,
    *,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (),
    seconds: float = 2.0,
    data: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measure a bundle's runtimes, and PyTorch eager beside them; on a GPU in half precision and compiled too.

    Args:
        bundle: a bundle that was read.
        runtimes: of the bundle, or ``pytorch``, ``pytorch-fp16``, ``pytorch-fp16-compile``; none takes ``pytorch``, on
            a GPU all three, and all of the bundle's that are data: torch's programs, which run code of the bundle's
            maker, are loaded only if named.
        batches: batch sizes.
        threads: numbers of CPU threads; none takes what the container's quota allows.
        seconds: for each batch of each runtime, in three turns; the turns of all runtimes alternate.
        data: photos in LABEL/PHOTO of the bundle's labels, for accuracy.
        say: told what is going on.

    Raises:
        UsageError: an unknown runtime, or none that runs here.
    """
    data_only = [name for name, file in bundle.runtimes.items() if Path(file).suffix not in (".pt", ".pt2")]
    names = list(dict.fromkeys(runtimes)) or [*pytorch_here(), *data_only]
    unknown = [name for name in names if name not in PYTORCH and name not in bundle.runtimes]
    if unknown:
        raise UsageError(
            f"bundle '{bundle.info.name}' has no runtime '{unknown[0]}' (it has {', '.join(bundle.runtimes)})"
        )
    # imported here: a worker must not have torch in its memory, and runtimes alone are measured without it
    proof, gflop = None, None
    if data:
        from cliphar.export import read_proof

        proof = read_proof(bundle, data)
        if proof.truth is None:
            raise UsageError(
                f"{data} has folders that are not labels of '{bundle.info.name}'; accuracy needs its labels"
            )
    if EAGER in names:
        from cliphar.export import float_graph

        gflop = round(count_flops(float_graph(bundle), bundle.info.image.size) / 1e9, 3)
    skipped: dict[str, str] = {}
    workers: list[_Worker] = []
    try:
        for count in threads or [cpu_quota()]:
            for name in names:
                say(f"starting {name} with {count} threads")
                worker = _start(bundle, name, count, skipped)
                workers += [worker] if worker else []
        if not workers:
            raise UsageError(f"no runtime runs here: {'; '.join(skipped.values())}")
        peaks = {
            worker.threads: peak / 1e9 for worker in workers if worker.name == EAGER and (peak := worker.ask("peak"))
        }
        times: dict[_Key, list[float]] = {}
        rates: dict[_Key, list[float]] = {}
        for turn in range(_ROUNDS):
            say(f"turn {turn + 1} of {_ROUNDS}")
            for batch in batches:
                for worker in workers:
                    key = (worker.name, worker.threads, batch)
                    times.setdefault(key, []).extend(worker.ask("tensors", batch, seconds / _ROUNDS))
                    rates.setdefault(key, []).append(worker.ask("bytes", batch, seconds / _ROUNDS))
        rows = [
            _row(bundle, worker, batch, gflop, times, rates, peaks.get(worker.threads), accuracy, memory)
            for worker in workers
            for accuracy, memory in [(_accuracy(bundle, worker, proof), worker.ask("memory"))]
            for batch in batches
        ]
    finally:
        for worker in workers:
            worker.stop()
    rounded = {count: round(peak, 1) for count, peak in peaks.items()}
    return Bench(bundle.info.name, gflop, rounded, rows, skipped)


def pytorch_here() -> tuple[str, ...]:
    """Which of ``PYTORCH`` are measured unless runtimes are named; ImportError without torch."""
    import torch

    return PYTORCH if torch.cuda.is_available() else (EAGER,)


def _start(bundle: Bundle, name: str, threads: int, skipped: dict[str, str]) -> _Worker | None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, bundle.path, name, threads), daemon=True)
    resource_tracker.ensure_running()  # or it starts now, and unblocks what is blocked here
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is ours: we end them
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = f"{name} ended while it was loading"
    if isinstance(answer, str):
        skipped[name] = answer
        process.join()
        ours.close()
        return None
    return _Worker(name, threads, ours, process, answer["load_s"])


def _accuracy(bundle: Bundle, worker: _Worker, proof: Proof | None) -> float | None:
    if proof is None or worker.name in PYTORCH:
        return None
    embeddings = np.concatenate(worker.ask("embed", proof.verification, 8))
    return round(float(((embeddings @ bundle.class_vectors().T).argmax(1) == proof.truth).mean()), 4)


def _row(
    bundle: Bundle,
    worker: _Worker,
    batch: int,
    gflop: float | None,
    times: Mapping[_Key, list[float]],
    rates: Mapping[_Key, list[float]],
    peak: float | None,
    accuracy: float | None,
    memory: float,
) -> Row:
    key = (worker.name, worker.threads, batch)
    eager = times.get((EAGER, worker.threads, batch))
    median = float(np.median(times[key]))
    return Row(
        runtime=worker.name,
        batch=batch,
        threads=worker.threads,
        images_per_s=round(batch / median, 2),
        p50_ms=_percentile(times[key], 50),
        p95_ms=_percentile(times[key], 95),
        p99_ms=_percentile(times[key], 99),
        bytes_images_per_s=round(float(np.median(rates[key])), 2),
        speedup=None if eager is None else round(float(np.median(eager)) / median, 3),
        peak_share=None if peak is None or gflop is None else round(batch / median * gflop / peak, 3),
        load_s=round(worker.load_s, 3),
        memory_mib=round(memory, 1),
        file_mib=round(_file_mib(bundle, worker.name), 1),
        accuracy=accuracy,
    )


def _percentile(times: list[float], q: float) -> float:
    return round(float(np.percentile(times, q)) * 1000, 2)


def _file_mib(bundle: Bundle, name: str) -> float:
    """Size of a runtime's files; 0 for PyTorch, whose weights are in none of them."""
    files = bundle.info.files
    if name in PYTORCH:
        return 0.0
    if name == "onnx":  # a graph may refer to a file of weights beside it
        others = {"text.onnx", "tokenizer.json"}
        size = sum(
            file.bytes
            for path, file in files.items()
            if path.endswith(".onnx") and file.runtime is None and path not in others
        )
    else:
        size = sum(file.bytes for file in files.values() if file.runtime == name)
    return size / 2**20
