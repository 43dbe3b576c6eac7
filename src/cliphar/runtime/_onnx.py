"""ONNX Runtime, on whatever execution provider is present."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, UsageError
from cliphar.runtime._cpu import cpu_quota

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

__all__ = ["OnnxRuntime", "available_providers"]

_PREFERENCE = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}


def available_providers() -> list[str]:
    """Short names (``tensorrt``, ``cuda``, ``openvino``, ``cpu``) the installed ONNX Runtime has, best first."""
    import onnxruntime

    present = set(onnxruntime.get_available_providers())
    return [short for short, name in _PREFERENCE.items() if name in present]


class OnnxRuntime:
    """A bundle's image.onnx and text.onnx.

    Args:
        bundle: a bundle that was read.
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ``openvino``; None takes the best present, and goes on to the
            next if it does not start.
        threads: for the CPU; None takes what the container's quota allows.

    Raises:
        BundleError: a graph is not one that this version can run.
        UsageError: the provider asked for is not present.
    """

    def __init__(self, bundle: Bundle, *, provider: str | None = None, threads: int | None = None) -> None:
        self.threads = threads or cpu_quota()
        present = available_providers()
        if provider is not None and provider not in present:
            raise UsageError(
                f"provider {provider!r} is not in this ONNX Runtime (it has {', '.join(present)}); "
                "choose one of those or install the build that has it"
            )
        self.bundle = bundle
        self._image = _session(bundle, "image.onnx", provider, self.threads)
        self.provider = next(
            (short for short, name in _PREFERENCE.items() if name == self._image.get_providers()[0]), "cpu"
        )
        self.name = f"onnx-{self.provider}"
        self._tokenizer = _tokenizer(bundle)

    @functools.cached_property
    def _text(self) -> onnxruntime.InferenceSession:
        # only when a label is not known yet; the text tower is small and always quick enough on the CPU
        return _session(self.bundle, "text.onnx", "cpu", self.threads)

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; ValueError if the shape or dtype is not the bundle's."""
        side = self.bundle.info.image.size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise ValueError(f"expected uint8 [N,{side},{side},3], got {images.dtype} {images.shape}")
        # a graph with a batch of one quantises by what is in the batch, so an answer would depend on its neighbours
        step = 1 if self._image.get_inputs()[0].shape[0] == 1 else len(images)
        parts = [
            self._image.run(["embeddings"], {"images": images[at : at + step]})[0] for at in range(0, len(images), step)
        ]
        result: NDArray[np.float32] = np.concatenate(parts)
        return result

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See :class:`Runtime`."""
        ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], np.int64)
        result: NDArray[np.float32] = self._text.run(["embeddings"], {"ids": ids})[0]
        return result


def _tokenizer(bundle: Bundle) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    except BundleError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        reason = str(error).splitlines()[0]
        raise BundleError(f"tokenizer.json of bundle '{bundle.info.name}' cannot be read: {reason}") from error
    tokenizer.enable_truncation(bundle.info.text.context_length)
    tokenizer.enable_padding()
    return tokenizer


def _session(bundle: Bundle, name: str, provider: str | None, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    wanted = [provider] if provider else available_providers()
    providers = [_PREFERENCE[short] for short in wanted]
    if providers[-1] != _PREFERENCE["cpu"]:
        providers.append(_PREFERENCE["cpu"])
    try:
        return onnxruntime.InferenceSession(str(bundle.file(name)), options, providers=providers)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime raises its own classes for each status, all RuntimeError or Exception
        reason = str(error).splitlines()[0]
        raise BundleError(f"{name} of bundle '{bundle.info.name}' does not run here: {reason}") from error
