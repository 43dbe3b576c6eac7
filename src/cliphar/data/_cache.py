"""A data set decoded and resized once, and mapped into memory ever after."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.bundle import workplace
from cliphar.data._clips import clip_frames
from cliphar.data._duplicates import difference_hash, group_duplicates
from cliphar.data._readers import PhotoSource
from cliphar.data._sources import Photo
from cliphar.errors import DataError, MediaError, naming, one_line
from cliphar.media import decode_image, is_clip_name
from cliphar.runtime import cpu_quota

__all__ = ["PhotoSet", "load_photos"]

_VERSION = 5  # of what readers make of a source, too
_AHEAD = 64
_Found = tuple[NDArray[np.uint8], float] | MediaError


@dataclass(frozen=True)
class PhotoSet:
    """N photos, or clips of T frames each.

    ``labels`` are theirs or None, ``captions`` theirs or (), ``splits`` ``train``, ``val``, ``test`` or None,
    ``groups`` int64 [N] numbers that near-duplicates share, ``seconds`` float [N] a clip's length, 0 for a photo,
    ``refused`` what could not be read with the reason, and ``sha256`` a digest of contents, labels and captions.
    """

    keys: list[str]
    labels: list[str | None]
    captions: list[tuple[str, ...]]
    splits: list[str | None]
    groups: NDArray[np.int64]
    seconds: NDArray[np.float64]
    refused: list[tuple[str, str]]
    sha256: str
    _pixels: NDArray[np.uint8]
    _offsets: NDArray[np.int64]
    _shapes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def frames(self, i: int) -> NDArray[np.uint8]:
        """Item i: uint8 RGB [T,H,W,3], a view of the cache; T is 1 for a photo."""
        flat = self._pixels[self._offsets[i] : self._offsets[i + 1]]
        return flat.reshape(self._shapes[i])

    def photo(self, i: int) -> NDArray[np.uint8]:
        """The photo, or the clip's middle frame: uint8 RGB [H,W,3]."""
        frames = self.frames(i)
        middle: NDArray[np.uint8] = frames[len(frames) // 2]
        return middle


def load_photos(
    source: PhotoSource,
    cache: Path,
    *,
    side: int,
    max_aspect: float = 2.0,
    frames: int = 8,
    log: Callable[[str], None] = lambda _: None,
) -> PhotoSet:
    """Read ``source`` through its cache, which is made the first time and anew when the source changes.

    Args:
        source: from ``open_source``.
        cache: a folder for the caches of any number of sources.
        side: photos are cached with a short side of at most this many pixels.
        max_aspect: and cropped around the centre to this aspect at most.
        frames: so many of a clip, evenly spread.
        log: told what is done, and what cannot be read.

    Raises:
        DataError: the source is malformed, or holds nothing that can be read.
    """
    key = f"{_VERSION} {source.fingerprint} {side} {max_aspect} {frames}"
    folder = cache / f"photos-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        photos = _open(folder)
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):  # none yet, or cut short as by a power cut
        shutil.rmtree(folder, ignore_errors=True)
        log(f"decoding {source.name} into {folder}")
        _build(source, folder, side, max_aspect, frames, log)
        photos = _open(folder)
    if source.note:
        log(one_line(source.note))
    for key, reason in photos.refused:
        log(one_line(f"left out {key}: {reason}"))
    return photos


def _open(folder: Path) -> PhotoSet:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    index |= {name: list(map(tuple, index[name])) for name in ("captions", "refused")}
    arrays = dict(np.load(folder / "arrays.npz"))
    pixels = np.memmap(folder / "pixels.bin", np.uint8, "r", shape=(int(arrays["_offsets"][-1]),))
    return PhotoSet(**index, **arrays, _pixels=pixels)


def _small(image: Image.Image, side: int, max_aspect: float) -> NDArray[np.uint8]:
    width, height = image.size
    bound = min(width, height) * max_aspect
    kept_width, kept_height = min(width, bound), min(height, bound)
    scale = min(1.0, side / min(kept_width, kept_height))
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    size = (max(1, round(kept_width * scale)), max(1, round(kept_height * scale)))
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _decode(photo: Photo, side: int, max_aspect: float, frames: int) -> _Found:
    try:
        if is_clip_name(photo.key):
            found, seconds = clip_frames(photo.content, frames, side)
            return np.stack([_small(frame, side, max_aspect) for frame in found]), seconds
        return _small(decode_image(photo.content, min_side=side), side, max_aspect)[None], 0.0
    except MediaError as error:
        return error


def _ahead(photos: Iterator[Photo], work: Callable[[Photo], _Found]) -> Iterator[tuple[Photo, _Found]]:
    """Each photo with its decoded frames, in order; a bounded number of them is under way."""
    with ThreadPoolExecutor(cpu_quota()) as pool:
        pending: list[tuple[Photo, Future[_Found]]] = []
        for photo in photos:
            pending.append((photo, pool.submit(work, photo)))
            if len(pending) >= _AHEAD:
                first, future = pending.pop(0)
                yield first, future.result()
        for photo, future in pending:
            yield photo, future.result()


def _build(
    source: PhotoSource, folder: Path, side: int, max_aspect: float, frames: int, log: Callable[[str], None]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept: list[Photo] = []
    refused: list[tuple[str, str]] = []
    shapes, seconds, hashes = [], [], []
    digest = hashlib.sha256()
    with workplace(folder) as work:
        with naming(folder), (work / "pixels.bin").open("wb") as pixels:
            for photo, found in _ahead(source.read(), lambda photo: _decode(photo, side, max_aspect, frames)):
                about = [photo.key, photo.label, photo.captions, photo.split]
                digest.update(f"{json.dumps(about)}\0{hashlib.sha256(photo.content).hexdigest()}\n".encode())
                if isinstance(found, MediaError):
                    refused.append((photo.key, str(found).removeprefix("the image ").removeprefix("the video ")))
                    continue
                view, length = found
                pixels.write(view.tobytes())
                seconds.append(length)
                kept.append(replace(photo, content=b""))
                shapes.append(view.shape)
                hashes.append(difference_hash(view[len(view) // 2]))
                if len(kept) % 5000 == 0:
                    log(f"decoded {len(kept):,}")
        if not kept:
            why = " ".join(refused[0]) if refused else "no LABEL/PHOTO"
            raise DataError(f"none of the {len(refused)} photos in {source.name} can be read: {why}")
        np.savez(
            work / "arrays.npz",
            groups=group_duplicates(hashes),
            seconds=seconds,
            _shapes=np.array(shapes, np.int64),
            _offsets=np.cumsum([0] + [np.prod(shape) for shape in shapes], dtype=np.int64),
        )
        index = {
            "keys": [photo.key for photo in kept],
            "labels": [photo.label for photo in kept],
            "captions": [photo.captions for photo in kept],
            "splits": [photo.split for photo in kept],
            "refused": refused,
            "sha256": digest.hexdigest(),
        }
        (work / "index.json").write_text(json.dumps(index))
        try:
            work.chmod(0o755)
            work.rename(folder)
        except OSError:
            if not (folder / "index.json").is_file():  # else another run has just made the same
                raise
