"""What every engine shares: the text tower on ONNX Runtime, the check of images."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import BundleError
from cliphar.runtime._base import Runtime

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

__all__ = ["Engine", "check_images", "does_not_run"]

_LOG = logging.getLogger("cliphar.runtime")


def check_images(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    """ValueError if the shape or dtype is not the bundle's."""
    side = bundle.info.image.size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
        raise ValueError(f"expected uint8 [N,{side},{side},3], got {images.dtype} {images.shape}")


def does_not_run(bundle: Bundle, file: str, error: Exception) -> BundleError:
    """What an engine says of a file that it cannot load or run, in one line."""
    # OpenVINO begins with where in its own source it is
    lines = [line for line in str(error).split("\n") if not line.startswith("Exception from")]
    reason = " ".join(" ".join(lines).split())[:300] or type(error).__name__
    return BundleError(f"{file} of bundle '{bundle.info.name}' does not run here: {reason}")


class Engine(Runtime):
    """Runs a bundle; its text.onnx, which is small, always on the CPU.

    Raises:
        BundleError: the tokenizer cannot be read, or, at the first text, the graph does not run.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.bundle = bundle
        self.threads = threads
        self._tokenizer = _tokenizer(bundle)

    @functools.cached_property
    def _text(self) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        path = str(self.bundle.same_file("text.onnx"))
        try:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own classes for each status
            raise does_not_run(self.bundle, "text.onnx", error) from error

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See :class:`Runtime`; a sentence without a word that the vocabulary has is warned of."""
        encodings = self._tokenizer.encode_batch(list(texts))
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        for text, encoding in zip(texts, encodings, strict=True):
            own = {word for word, added in zip(encoding.tokens, encoding.special_tokens_mask, strict=True) if not added}
            if own == {unknown}:
                _LOG.warning("the model knows no word of '%s': its answer means nothing; say it in English", text[:50])
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        session = self._text
        try:
            result: NDArray[np.float32] = session.run(["embeddings"], {"ids": ids})[0]
        except Exception as error:  # of memory, or of other lengths than bundle.json's
            raise does_not_run(self.bundle, "text.onnx", error) from error
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
    if tokenizer.padding is None:  # a tower that takes only its full length says so in its tokenizer
        tokenizer.enable_padding()
    return tokenizer
