"""OpenVINO on the CPU."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, UsageError
from cliphar.runtime._base import cpu_quota
from cliphar.runtime._text import Engine, check_images, does_not_run

__all__ = ["OpenVinoRuntime", "import_openvino"]


def import_openvino() -> Any:
    """The package, without its telemetry, which tells Google Analytics of every import; UsageError if there is none."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # "not installed": it then takes a stub
    try:
        import openvino
    except ImportError as error:
        raise UsageError("OpenVINO is not installed; run: pip install 'cliphar[openvino]'") from error
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


class OpenVinoRuntime(Engine):
    """An OpenVINO IR that export made of a bundle's image graph.

    Args:
        bundle: a bundle that was read.
        file: the bundle's .xml; one whose name holds ``bf16`` computes in bfloat16, all others in float32 or int8.
        threads: CPU threads; None takes what the container's quota allows.

    Raises:
        UsageError: OpenVINO is not installed.
        BundleError: the model does not compile here.
    """

    def __init__(self, bundle: Bundle, *, file: str, threads: int | None = None) -> None:
        openvino = import_openvino()
        threads = threads or cpu_quota()
        self.name = bundle.info.files[file].runtime or "openvino"
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # left to itself it takes bfloat16 where the CPU has it, and is no longer what was verified
            "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in file else "f32",
        }
        try:
            core = openvino.Core()
            # On a thread that ends: OpenVINO gives the one that compiles a stack for signals, and frees it with the
            # model, maybe from another thread. The next signal, such as SIGTERM, would then be a segmentation fault.
            with ThreadPoolExecutor(1) as pool:
                model = core.read_model(bundle.file(file))
                self._model = pool.submit(core.compile_model, model, "CPU", settings).result()
        except BundleError:
            raise
        except Exception as error:  # OpenVINO raises RuntimeError and its own
            raise does_not_run(bundle, file, error) from error
        self._file = file
        self._local = threading.local()
        super().__init__(bundle, threads)

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; ValueError for another shape or dtype, BundleError if it does not run."""
        check_images(self.bundle, images)
        request = getattr(self._local, "request", None)  # a request serves one thread at a time
        try:
            if request is None:
                request = self._local.request = self._model.create_infer_request()
            result: NDArray[np.float32] = np.array(request.infer([images], share_inputs=True)[0])
        except Exception as error:  # of memory, or of other sizes than bundle.json's
            raise does_not_run(self.bundle, self._file, error) from error
        return result
