"""A TensorRT engine, on the GPU it was built for."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, UsageError
from cliphar.runtime._base import cpu_quota
from cliphar.runtime._text import Engine, check_images

__all__ = ["TensorRtRuntime", "import_tensorrt"]


def import_tensorrt() -> tuple[Any, Any]:
    """The package and CUDA's runtime bindings; UsageError if one is missing."""
    try:
        import tensorrt
        from cuda.bindings import runtime
    except ImportError as error:
        raise UsageError(
            f"TensorRT is not here ({error}); run 'pip install tensorrt-cu13==10.14.1.48.post1 cuda-python'"
        ) from error
    return tensorrt, runtime


class TensorRtRuntime(Engine):
    """A bundle's .plan. An engine runs on the kind of GPU and the TensorRT version that built it, and no other.

    Raises:
        UsageError: TensorRT, its CUDA bindings or a GPU is missing.
        BundleError: the engine is another GPU's or version's, or the GPU's memory is full.
    """

    max_batch = 64  # of the optimisation profile that export builds

    def __init__(self, bundle: Bundle, *, file: str, threads: int | None = None) -> None:
        tensorrt, self._cuda = import_tensorrt()
        cuda = self._cuda
        self.bundle = bundle
        self.name = bundle.info.files[file].runtime or "tensorrt"
        status, count = cuda.cudaGetDeviceCount()
        if status.value or not count:
            raise UsageError("TensorRT needs a GPU and there is none here; choose another runtime")
        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(
            bundle.file(file).read_bytes()
        )
        if engine is None:
            raise BundleError(
                f"{file} of bundle '{bundle.info.name}' was built for another GPU or TensorRT than "
                f"{tensorrt.__version__}; run 'cliphar export' here"
            )
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise BundleError(f"{file} of bundle '{bundle.info.name}' does not run here: too little of the GPU is free")
        self._stream = self._call(cuda.cudaStreamCreate())
        size, dim = bundle.info.image.size, bundle.info.embedding_dim
        self._input = self._call(cuda.cudaMalloc(self.max_batch * size * size * 3))
        self._output = self._call(cuda.cudaMalloc(self.max_batch * dim * 4))
        weakref.finalize(self, _free, cuda, self._stream, (self._input, self._output))
        self._context.set_tensor_address("images", int(self._input))
        self._context.set_tensor_address("embeddings", int(self._output))
        self._lock = threading.Lock()
        super().__init__(bundle, threads or cpu_quota())

    def _call(self, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if status.value:
            raise BundleError(f"{self.name} of bundle '{self.bundle.info.name}' does not run here: {status.name}")
        return values[0] if values else None

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; ValueError if the shape or dtype is not the bundle's."""
        check_images(self.bundle, images)
        cuda = self._cuda
        out = np.empty((len(images), self.bundle.info.embedding_dim), np.float32)
        with self._lock:
            for at in range(0, len(images), self.max_batch):
                part = np.ascontiguousarray(images[at : at + self.max_batch])
                answer = out[at : at + self.max_batch]
                to_device, to_host = cuda.cudaMemcpyKind(1), cuda.cudaMemcpyKind(2)
                self._context.set_input_shape("images", part.shape)
                self._call(cuda.cudaMemcpyAsync(self._input, part.ctypes.data, part.nbytes, to_device, self._stream))
                if not self._context.execute_async_v3(int(self._stream)):
                    raise BundleError(f"{self.name} of bundle '{self.bundle.info.name}' did not run; see its message")
                self._call(cuda.cudaMemcpyAsync(answer.ctypes.data, self._output, answer.nbytes, to_host, self._stream))
                self._call(cuda.cudaStreamSynchronize(self._stream))
        return out


def _free(cuda: Any, stream: Any, buffers: tuple[Any, ...]) -> None:
    """A service that takes another model goes on; what CUDA gave is not freed with the object."""
    for buffer in buffers:
        cuda.cudaFree(buffer)
    cuda.cudaStreamDestroy(stream)
