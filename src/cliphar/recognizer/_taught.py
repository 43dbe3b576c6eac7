"""Actions taught from photos: their vectors, what teaching reports, and their file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cliphar.bundle import Bundle, write_whole
from cliphar.errors import BundleError, MediaError
from cliphar.recognizer._types import Score

__all__ = ["TAUGHT_FILE", "Lesson", "Taught", "read_taught", "taught_key", "write_taught"]

TAUGHT_FILE = "taught.safetensors"


@dataclass(frozen=True)
class Taught:
    """A taught action: ``known`` and ``open``, float32 [D] of unit length, are compared with class vectors and with
    text vectors; ``photos`` is how many photos taught it."""

    known: NDArray[np.float32]
    open: NDArray[np.float32]
    photos: int


@dataclass(frozen=True)
class Lesson:
    """What teaching an action came to.

    ``photos`` were used, ``refused`` could not be read. ``recall`` is the share of the photos that are recognised by
    what the others teach, among all actions the recogniser knows (leave-one-out; 0..1); None with fewer than two
    photos or nothing to tell it from. ``confused_with`` is what was answered instead, with its share of the photos,
    most first.
    """

    name: str
    photos: int
    refused: tuple[MediaError, ...]
    recall: float | None
    confused_with: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``refused`` as messages, shares to three digits."""
        return {
            "name": self.name,
            "photos": self.photos,
            "refused": [str(error) for error in self.refused],
            "recall": None if self.recall is None else round(self.recall, 3),
            "confused_with": [{"label": label, "score": round(share, 3)} for label, share in self.confused_with],
        }


def taught_key(bundle: Bundle) -> str:
    """A digest of what taught vectors depend on: towers, class vectors and background, but not their runtimes."""
    files = bundle.info.files
    parts = ("image.onnx", "text.onnx", "head.safetensors", "background.safetensors")
    return hashlib.sha256(
        "\n".join(f"{name} {files[name].sha256}" for name in parts if name in files).encode()
    ).hexdigest()


def write_taught(path: Path, bundle: Bundle, taught: Mapping[str, Taught]) -> None:
    """Write taught actions to a file, whole or not at all."""
    dim = bundle.info.embedding_dim
    vectors = {
        form: np.stack([getattr(one, form) for one in taught.values()]) if taught else np.zeros((0, dim), np.float32)
        for form in ("known", "open")
    }
    counts = {name: one.photos for name, one in taught.items()}
    about = {"bundle": taught_key(bundle), "photos": json.dumps(counts, ensure_ascii=False)}
    write_whole(path, save(vectors, about))


def read_taught(path: Path, bundle: Bundle) -> dict[str, Taught]:
    """Actions of a file that ``write_taught`` wrote.

    Raises:
        BundleError: it cannot be read, is no such file, or was taught to another bundle.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            known, open_ = file.get_tensor("known"), file.get_tensor("open")
        counts: dict[str, int] = json.loads(about["photos"])
        rows = zip(counts.items(), known, open_, strict=True)
        taught = {str(name): Taught(a, b, int(photos)) for (name, photos), a, b in rows}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"cannot read taught actions from {path}: {error}; remove it and teach them again") from error
    if about.get("bundle") != taught_key(bundle):
        raise BundleError(
            f"the actions in {path} were taught to another model than '{bundle.info.name}'; "
            "use that one, or teach them again"
        )
    return taught
