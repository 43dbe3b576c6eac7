"""ONNX Runtime, on whatever execution provider is present."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle, store
from cliphar.errors import BundleError, UsageError
from cliphar.runtime._base import cpu_quota
from cliphar.runtime._text import Engine, check_images, does_not_run

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxRuntime", "available_providers"]

_LOG = logging.getLogger("cliphar.runtime")
_LANES_BELOW = 128 * 2**20  # bytes of a graph: lanes hold its weights once more
_SMALL_BELOW = 32 * 2**20  # bytes of a graph: a larger one's weights had better be read for many photos at once
_NVIDIA = {"tensorrt", "cuda"}
_PREFERENCE = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}


def available_providers() -> list[str]:
    """Short names (``cuda``, ``tensorrt``, ``openvino``, ``cpu``) the installed ONNX Runtime has, best first."""
    import onnxruntime

    present = set(onnxruntime.get_available_providers())
    return [short for short, name in _PREFERENCE.items() if name in present]


@cache
def _without_nvidia() -> bool:
    """Whether no GPU of NVIDIA's can be here, which is said once: ONNX Runtime would try, and fail in many lines."""
    if sys.platform != "linux" or any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists():
        return False
    _LOG.warning("no GPU is seen, so the CPU is used; 'cliphar doctor' says more")
    return True


@cache
def _load_cuda() -> None:
    """Load CUDA's libraries out of NVIDIA's packages, which ``onnxruntime-gpu[cuda]`` brings: no linker looks there."""
    import onnxruntime

    with redirect_stdout(io.StringIO()):  # it prints what it misses; a provider that does not start is told of below
        onnxruntime.preload_dlls()


class OnnxRuntime(Engine):
    """A bundle's image.onnx, or another ONNX graph that export made of it, and its text.onnx.

    On a CPU one photo is run by all threads together. Where there are as many photos as threads, each thread runs some
    by itself: threads that share an operator wait for each other at its end, the more so if other work holds up one of
    them. Of a small graph it runs two at a time: what lies between two layers then stays in the core's own cache.

    Args:
        bundle: a bundle that was read.
        file: the bundle's image graph to run.
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ``openvino``; None takes the best present. If it does not start, or
            needs a GPU and there is none, the next one is taken. ``tensorrt`` is taken only if named: it builds an
            engine, which takes minutes, for the first batch and for each larger or smaller than all before.
        threads: for the CPU; None takes what the container's quota allows.

    Raises:
        BundleError: a graph is not one that this version can run.
        UsageError: the provider asked for is not present.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        file: str = "image.onnx",
        provider: str | None = None,
        threads: int | None = None,
    ) -> None:
        threads = threads or cpu_quota()
        present = available_providers()
        if provider is not None and provider not in present:
            raise UsageError(
                f"provider {provider!r} is not in this ONNX Runtime (it has {', '.join(present)}); "
                "choose one of those or install the build that has it"
            )
        self.file = file
        self._image = _session(bundle, file, provider, threads)
        self._single = self._image.get_inputs()[0].shape[0] == 1
        self._alone: tuple[onnxruntime.InferenceSession, ThreadPoolExecutor, int] | None = None
        self._making = threading.Lock()
        self.provider = next(
            (short for short, name in _PREFERENCE.items() if name == self._image.get_providers()[0]), "cpu"
        )
        size = bundle.info.files[file].bytes
        self.lanes = threads if self.provider == "cpu" and size < _LANES_BELOW else 1
        self._small = self.provider == "cpu" and size < _SMALL_BELOW
        asked = provider or present[0]
        missed = self.provider != asked and (provider or self.provider == "cpu")
        if missed and not (asked in _NVIDIA and _without_nvidia()):  # which has been said
            _LOG.warning("%s did not start, so %s is used; 'cliphar doctor' says more", asked, self.provider)
        self.name = f"{bundle.info.files[file].runtime or 'onnx'}-{self.provider}"
        super().__init__(bundle, threads)

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; ValueError for another shape or dtype, BundleError if it does not run."""
        check_images(self.bundle, images)
        if self.lanes == 1 or len(images) < self.threads:
            return self._run(self._image, images)
        session, pool = self._one_thread()
        parts = pool.map(lambda part: self._run(session, part), np.array_split(images, self.threads))
        return np.concatenate(list(parts))

    def encode_lane(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; raises what encode_images does."""
        if self.lanes == 1:
            return super().encode_lane(images)
        check_images(self.bundle, images)
        return self._run(self._one_thread()[0], images)

    def _one_thread(self) -> tuple[onnxruntime.InferenceSession, ThreadPoolExecutor]:
        """A session that runs on its caller's thread, and threads to call it from."""
        with self._making:
            if self._alone is None or self._alone[2] != os.getpid():  # a fork is without its parent's threads
                pool = ThreadPoolExecutor(self.lanes, thread_name_prefix="lane")
                self._alone = self._another(), pool, os.getpid()
            return self._alone[:2]

    def _another(self) -> onnxruntime.InferenceSession:
        """A session of one thread; the one there is where another model has taken the bundle's place since."""
        try:
            self.bundle.same_file(self.file)
        except BundleError:
            return self._image
        return _session(self.bundle, self.file, self.provider, 1)

    def _run(self, session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        # a graph with a batch of one quantises by what is in the batch, so an answer would depend on its neighbours
        one_thread = self.threads == 1 or session is not self._image
        step = 1 if self._single else 2 if one_thread and self._small else len(images)
        parts = (images[at : at + step] for at in range(0, len(images), step))
        try:
            return np.concatenate([session.run(["embeddings"], {"images": part})[0] for part in parts])
        except Exception as error:  # of memory, or of other sizes than bundle.json's
            raise does_not_run(self.bundle, self.file, error) from error


def _session(bundle: Bundle, name: str, provider: str | None, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    present = available_providers()
    wanted = [provider] if provider else [short for short in present if short != "tensorrt"]
    if provider == "tensorrt" and "cuda" in present:
        wanted.append("cuda")  # for what TensorRT does not take, as a transposition of uint8
    if not _NVIDIA.isdisjoint(wanted) and _without_nvidia():
        wanted = [short for short in wanted if short not in _NVIDIA]
    if not _NVIDIA.isdisjoint(wanted):
        _load_cuda()
    providers = [(_PREFERENCE[short], _options(bundle, name, short)) for short in dict.fromkeys([*wanted, "cpu"])]
    try:
        return onnxruntime.InferenceSession(str(bundle.file(name)), options, providers=providers)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime raises its own classes for each status, all RuntimeError or Exception
        raise does_not_run(bundle, name, error) from error


def _options(bundle: Bundle, name: str, provider: str) -> dict[str, str]:
    """For TensorRT where it keeps its engines: it tells models apart by their operators, and not by their weights."""
    if provider != "tensorrt":
        return {}
    kept = store() / "tensorrt" / bundle.info.files[name].sha256[:16]
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only container builds them at each start
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(kept),
    }
