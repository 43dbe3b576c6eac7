"""Which of a bundle's runtimes to load: the one asked for, else the fastest that this machine runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from cliphar.bundle import Bundle, packaged, store, write_whole
from cliphar.errors import ClipharError, UsageError
from cliphar.media import decode_image, to_square
from cliphar.runtime._base import Runtime, cpu_quota
from cliphar.runtime._onnx import OnnxRuntime
from cliphar.runtime._openvino import OpenVinoRuntime
from cliphar.runtime._tensorrt import TensorRtRuntime
from cliphar.runtime._torch import TorchRuntime

__all__ = ["RuntimeChoice", "choose_runtime", "images_per_s", "load_runtime"]

_LOG = logging.getLogger("cliphar.runtime")
# those that are chosen among; torch is run for those alone who ask for it, as serving does without it
_ENGINES = {".onnx": "onnxruntime", ".xml": "openvino", ".plan": "tensorrt"}
_BATCH = 8
_ROUNDS = 3


@dataclass(frozen=True)
class RuntimeChoice:
    """The runtime that is loaded when none is asked for.

    ``images_per_s`` is what each was measured at on this machine, batch 8; empty where there was nothing to choose.
    ``failed`` says why others did not run.
    """

    name: str
    images_per_s: dict[str, float]
    failed: dict[str, str]


def load_runtime(
    bundle: Bundle, name: str | None = None, *, provider: str | None = None, threads: int | None = None
) -> Runtime:
    """Load one of ``bundle.runtimes``.

    Args:
        bundle: a bundle that was read.
        name: a runtime of the bundle; None takes CLIPHAR_RUNTIME, else the fastest, as :func:`choose_runtime` says.
        provider: for ONNX graphs, see :class:`OnnxRuntime`; with no name it takes the bundle's image.onnx.
        threads: CPU threads; None takes what the container's quota allows.

    Raises:
        UsageError: the bundle has no such runtime, its engine is not installed, or ``threads`` is below 1.
        BundleError: it does not run here.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads run nothing; give 1 or more, or None for as many as there may be")
    chosen = name or os.environ.get("CLIPHAR_RUNTIME") or None
    if chosen is None:
        chosen = "onnx" if provider else choose_runtime(bundle, threads).name
    if chosen not in bundle.runtimes:
        raise UsageError(
            f"bundle '{bundle.info.name}' has no runtime '{chosen}' (it has {', '.join(bundle.runtimes)}); choose one "
            "of those, or add one with 'cliphar export'"
        )
    file = bundle.runtimes[chosen]
    suffix = Path(file).suffix
    if suffix == ".onnx":
        return OnnxRuntime(bundle, file=file, provider=provider, threads=threads)
    if provider:
        raise UsageError(f"runtime '{chosen}' takes no provider; leave it out, or choose an onnx runtime")
    if suffix == ".xml":
        return OpenVinoRuntime(bundle, file=file, threads=threads)
    if suffix in (".pt2", ".pt"):
        return TorchRuntime(bundle, file=file, threads=threads)
    return TensorRtRuntime(bundle, file=file, threads=threads)


def choose_runtime(bundle: Bundle, threads: int | None = None) -> RuntimeChoice:
    """The fastest runtime whose engine is installed and that answers as proved; measured once here, then remembered.

    A torch program is not among them: it is run when it is asked for by name. Nothing is measured where there is
    only one. What was measured lies in runtimes.json in the models' store, under a key of the files, the engines'
    versions, the CPU and the threads, so that a change of any measures anew.
    """
    candidates = {
        name: file
        for name, file in bundle.runtimes.items()
        if (engine := _ENGINES.get(Path(file).suffix)) and find_spec(engine)
    }
    bundle.file("image.onnx")  # each bundle has it, or is none
    if len(candidates) == 1:
        return RuntimeChoice(next(iter(candidates)), {}, {})
    threads = threads or cpu_quota()
    key = _key(bundle, candidates, threads)
    memory = store() / "runtimes.json"
    choice = _remembered(memory, key)
    if choice is None or choice.name not in candidates:
        choice = _measure(bundle, list(candidates), threads)
        _remember(memory, key, choice)
    speeds = ", ".join(f"{name} {speed:g}" for name, speed in choice.images_per_s.items())
    _LOG.info("runtime %s is the fastest here (images a second: %s)", choice.name, speeds)
    return choice


def _remembered(memory: Path, key: str) -> RuntimeChoice | None:
    try:
        return TypeAdapter(RuntimeChoice).validate_python(_read(memory).get(key))
    except ValidationError:  # there is none, or it was written by hand or by another version
        return None


def _key(bundle: Bundle, candidates: dict[str, str], threads: int) -> str:
    facts = [bundle.info.files[file].sha256 for file in candidates.values()]
    engines = sorted({_ENGINES[Path(file).suffix] for file in candidates.values()})
    facts += [f"{engine} {_version(engine)}" for engine in engines]
    facts += [_cpu_model(), str(threads)]
    facts += [str(Path("/dev/nvidiactl").exists()), os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _version(engine: str) -> str:
    try:
        return metadata.version(engine)
    except metadata.PackageNotFoundError:  # a build for accelerators goes by another name: onnxruntime-gpu
        return str(import_module(engine).__version__)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(line for line in lines[:40] if line.startswith(("model", "flags", "Features")))


def _measure(bundle: Bundle, names: list[str], threads: int) -> RuntimeChoice:
    images = _samples(bundle)
    runtimes: dict[str, Runtime] = {}
    answers: dict[str, NDArray[np.float32]] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            runtimes[name] = load_runtime(bundle, name, threads=threads)
            answers[name] = runtimes[name].encode_images(images)
        except ClipharError as error:
            runtimes.pop(name, None)
            failed[name] = str(error)
    for name in list(runtimes):
        wrong = _unlike(bundle, name, answers)
        if wrong:
            del runtimes[name]
            failed[name] = wrong
    if not runtimes:
        raise UsageError(f"no runtime of bundle '{bundle.info.name}' runs here: {'; '.join(failed.values())}")
    speeds = images_per_s(runtimes, images)
    return RuntimeChoice(max(speeds, key=lambda name: speeds[name]), speeds, failed)


def images_per_s(runtimes: Mapping[str, Runtime], images: NDArray[np.uint8]) -> dict[str, float]:
    """The best of three rounds of each runtime on a batch, uint8 [N,S,S,3]."""
    best = dict.fromkeys(runtimes, np.inf)
    for _ in range(_ROUNDS):  # in turns, so that a change of the machine's speed meets all alike
        for name, runtime in runtimes.items():
            started = time.perf_counter()
            runtime.encode_images(images)
            best[name] = min(best[name], time.perf_counter() - started)
    return {name: round(len(images) / seconds, 1) for name, seconds in best.items()}


def _samples(bundle: Bundle) -> NDArray[np.uint8]:
    spec = bundle.info.image
    squares = [
        to_square(decode_image(file), spec.size, spec.max_aspect) for file in sorted(packaged("samples").glob("*.jpg"))
    ]
    return np.resize(np.stack(squares), (_BATCH, spec.size, spec.size, 3))


def _unlike(bundle: Bundle, name: str, answers: dict[str, NDArray[np.float32]]) -> str | None:
    """Why a runtime that was proved elsewhere is not to be trusted here, or None.

    8-bit products overflow on x86 processors without VNNI instructions, and engines differ between versions.
    """
    parity = bundle.info.files[bundle.runtimes[name]].parity
    if not parity or "cosine_min" not in parity or "onnx" not in answers:
        return None
    cosine = float((answers["onnx"] * answers[name]).sum(1).mean())
    if cosine >= parity["cosine_min"] - 1e-5:  # of float32 embeddings the last digits differ
        return None
    return f"its answers are unlike the reference's here: mean cosine {cosine:.3f}, proved {parity['cosine_min']:.3f}"


def _read(memory: Path) -> dict[str, dict[str, object]]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, key: str, choice: RuntimeChoice) -> None:
    try:
        write_whole(memory, json.dumps(_read(memory) | {key: asdict(choice)}, indent=1).encode())
    except OSError as error:  # a read-only container measures at each start
        _LOG.info("what was measured cannot be kept in %s (%s); set CLIPHAR_RUNTIME or CLIPHAR_HOME", memory, error)
