"""A data set copied into parts, as a folder that any tool reads."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict, deque
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cliphar.data._cache import PhotoSet
from cliphar.data._readers import SPLITS, PhotoSource
from cliphar.errors import DataError, naming
from cliphar.media import is_hidden, is_media

__all__ = ["copy_parts"]


def copy_parts(source: PhotoSource, photos: PhotoSet, parts: NDArray[np.int64], out: Path) -> dict[str, int]:
    """Write OUT/PART/LABEL/FILE, whole or not at all, leaving out what has no label; photos in each part.

    Args:
        photos: of ``source``.
        parts: int64 [N], 0 for train, 1 for val, 2 for test; a negative one is left out.
        out: a folder that does not exist yet.

    Raises:
        DataError: a label cannot be a folder's name, would be a hidden one's, which readers pass over, or another's.
    """
    places: dict[str, deque[tuple[int, str | None]]] = defaultdict(deque)  # a file may be named more than once
    for key, part, label in zip(photos.keys, parts, photos.labels, strict=True):
        places[key].append((int(part), label))
    counts, names = dict.fromkeys(SPLITS, 0), dict[str, str]()
    taken: Counter[Path] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for photo in source.read():
            waiting = places[photo.key]
            part, label = waiting.popleft() if waiting else (0, None)
            if label is None or part < 0:
                continue
            name = label.replace(" ", "_").replace("/", "_")
            folder = work / SPLITS[part] / name
            try:
                if is_hidden(name):
                    raise ValueError("it would be passed over")
                if names.setdefault(name, label) != label:
                    raise ValueError(f"{names[name]!r} has the same")
                folder.mkdir(parents=True, exist_ok=True)
            except ValueError as error:  # a label may hold what no name can
                raise DataError(f"label {label!r} cannot be a folder's name: {error}; rename it") from error
            pure = PurePosixPath(PurePosixPath(photo.key).name.lstrip("."))
            if not is_media(pure.name):  # else a copy of it is not known for a photo
                pure = PurePosixPath(f"{pure}.jpg")
            place = plain = folder / pure.name
            while place.exists():  # files of one name from different folders
                taken[plain] += 1
                place = folder / f"{pure.stem}-{taken[plain]}{pure.suffix}"
            with naming(out):
                place.write_bytes(photo.content)
            counts[SPLITS[part]] += 1
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts
