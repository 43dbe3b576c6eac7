"""A torch.export program or TorchScript, in torch itself; only for those who ask for it by name."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, UsageError, reason_of
from cliphar.runtime._base import cpu_quota
from cliphar.runtime._text import Engine, check_images, does_not_run

__all__ = ["TorchRuntime"]


class TorchRuntime(Engine):
    """A bundle's .pt2 (torch.export) or .pt (TorchScript). Both are programs: run none of someone you don't trust.

    Args:
        bundle: a bundle that was read.
        file: the bundle's .pt2 or .pt.
        threads: CPU threads, of all torch in this process; None takes what the container's quota allows.

    Raises:
        UsageError: torch is not installed.
        BundleError: this torch cannot read the file.
    """

    def __init__(self, bundle: Bundle, *, file: str, threads: int | None = None) -> None:
        try:
            import torch
        except ImportError as error:
            raise UsageError("torch is not installed; run: pip install 'cliphar[train]'") from error
        threads = threads or cpu_quota()
        self.name = bundle.info.files[file].runtime or "torchscript"
        torch.set_num_threads(threads)
        path = str(bundle.file(file))
        try:
            if file.endswith(".pt2"):
                program = torch.export.load(path).module()
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # in favour of torch.export
                    program = torch.jit.load(path)  # type: ignore[no-untyped-call]
        except Exception as error:  # zip's, JSON's and torch's own
            raise BundleError(
                f"{file} of bundle '{bundle.info.name}' cannot be read by torch {torch.__version__}: "
                f"{reason_of(error)}; run 'cliphar export' here"
            ) from error
        self._program = program
        self._file = file
        super().__init__(bundle, threads)

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Runtime`; ValueError for another shape or dtype, BundleError if it does not run."""
        import torch

        check_images(self.bundle, images)
        # torch takes no array that it may not write to
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        try:
            with torch.inference_mode():
                result: NDArray[np.float32] = self._program(pixels).numpy()
        except Exception as error:  # of memory, or of other sizes than bundle.json's
            raise does_not_run(self.bundle, self._file, error) from error
        return result
