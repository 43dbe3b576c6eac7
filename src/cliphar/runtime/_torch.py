"""The torch.export program or TorchScript that export made for C++, run from Python to verify it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, UsageError
from cliphar.runtime._cpu import cpu_quota
from cliphar.runtime._text import TextTower, check_images

__all__ = ["TorchRuntime"]


class TorchRuntime:
    """A bundle's .pt2 or .ts file. Both are programs that torch executes: load only bundles that you trust.

    Raises:
        UsageError: torch is not installed.
        BundleError: the file does not load here.
    """

    def __init__(self, bundle: Bundle, *, file: str, threads: int | None = None) -> None:
        try:
            import torch
        except ImportError as error:
            raise UsageError("torch is not installed; run 'pip install cliphar[train]'") from error
        self.bundle = bundle
        self.threads = threads or cpu_quota()
        self.name = bundle.info.files[file].runtime or "torch"
        path = str(bundle.file(file))
        try:
            self._module: Any = (
                torch.jit.load(path, "cpu") if path.endswith(".ts") else torch.export.load(path).module()  # type: ignore[no-untyped-call]
            )
        except Exception as error:  # torch raises RuntimeError, ValueError and its own
            reason = str(error).strip().splitlines()[0]
            raise BundleError(f"{file} of bundle '{bundle.info.name}' does not run here: {reason}") from error
        self._text = TextTower(bundle, self.threads)

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; ValueError if the shape or dtype is not the bundle's."""
        import torch

        check_images(self.bundle, images)
        with torch.inference_mode():
            result: NDArray[np.float32] = self._module(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        return result

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See :class:`Runtime`."""
        return self._text.encode(texts)
