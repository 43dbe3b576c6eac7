"""Photos that calibrate 8-bit exports, and others that prove every export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.bundle import Bundle, packaged
from cliphar.data import Photo, read_labelled
from cliphar.errors import DataError, MediaError
from cliphar.media import decode_image, to_square

__all__ = ["Proof", "read_proof"]

_CALIBRATION = 128
_VERIFICATION = 1024
_CROPS = 24


@dataclass(frozen=True)
class Proof:
    """Squares uint8 [N,S,S,3]: ``calibration`` and, of other photos, ``verification``.

    ``truth`` is the number of each verification photo's label among the bundle's, int64 [N], and ``rehearsal`` that
    of the calibration photos; None where the photos' folders are not the bundle's labels. ``photos`` is how many
    photos the squares were cut from.
    """

    calibration: NDArray[np.uint8]
    verification: NDArray[np.uint8]
    rehearsal: NDArray[np.int64] | None
    truth: NDArray[np.int64] | None
    photos: int


def read_proof(bundle: Bundle, source: Path | None) -> Proof:
    """Photos of a folder or tar, every fifth (at most 128) to calibrate and the others (at most 1024) to verify.

    Args:
        bundle: whose input size and labels they are for.
        source: a folder or a tar of photos, in LABEL/PHOTO if accuracy is to be measured; None takes crops of the
            package's own three photos, calibration and verification from different crops.

    Raises:
        DataError: fewer than 16 photos can be read.
    """
    if source is None:
        return _from_samples(bundle)
    spec = bundle.info.image
    found = read_labelled(source)
    order = np.random.default_rng(0).permutation(len(found))
    squares: dict[int, NDArray[np.uint8]] = {}
    for i in order:
        if len(squares) == _CALIBRATION + _VERIFICATION:
            break
        try:
            photo = decode_image(found[i].content, min_side=spec.size)
        except MediaError:
            continue
        squares[int(i)] = to_square(photo, spec.size, spec.max_aspect)
    if len(squares) < 16:
        raise DataError(f"{source} holds {len(squares)} readable photos; give at least 16, better 500")
    kept = list(squares)
    calibration = kept[::5][:_CALIBRATION]
    verification = sorted(set(kept) - set(calibration))
    return Proof(
        np.stack([squares[i] for i in calibration]),
        np.stack([squares[i] for i in verification]),
        _truth(bundle, [found[i] for i in calibration]),
        _truth(bundle, [found[i] for i in verification]),
        len(kept),
    )


def _truth(bundle: Bundle, photos: list[Photo]) -> NDArray[np.int64] | None:
    number = {label: i for i, label in enumerate(bundle.info.labels)}
    if not all(photo.label in number for photo in photos):
        return None
    return np.array([number[str(photo.label)] for photo in photos], np.int64)


def _from_samples(bundle: Bundle) -> Proof:
    size = bundle.info.image.size
    random = np.random.default_rng(0)
    files = sorted(packaged("samples").glob("*.jpg"))
    crops: list[NDArray[np.uint8]] = []
    for file in files:
        photo = decode_image(file)
        for _ in range(_CROPS):
            side = int(min(photo.size) * random.uniform(0.35, 1))
            left, top = (int(random.integers(0, extent - side + 1)) for extent in photo.size)
            crop = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
            crops.append(np.asarray(crop)[:, :: random.choice([-1, 1])])
    squares = np.stack(crops)
    return Proof(squares[::3], np.delete(squares, np.s_[::3], 0), None, None, len(files))
