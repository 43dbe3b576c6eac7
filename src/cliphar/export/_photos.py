"""Photos that calibrate 8-bit exports, and others that prove every export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.bundle import Bundle, packaged
from cliphar.data import labelled_keys, stream_labelled
from cliphar.errors import DataError, MediaError, one_line
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
    they were cut from.
    """

    calibration: NDArray[np.uint8]
    verification: NDArray[np.uint8]
    rehearsal: NDArray[np.int64] | None
    truth: NDArray[np.int64] | None
    photos: int


def read_proof(bundle: Bundle, source: Path | None, say: Callable[[str], None] = lambda _: None) -> Proof:
    """Photos of a folder or tar, every fifth (at most 128) to calibrate and the others (at most 1024) to verify.

    Args:
        bundle: whose input size and labels they are for.
        source: a folder or a tar of photos, in LABEL/PHOTO if accuracy is to be measured; None takes crops of the
            package's own three photos, others to calibrate than to verify.
        say: told what cannot be read.

    Raises:
        DataError: fewer than 16 photos can be read.
    """
    if source is None:
        return _from_samples(bundle)
    spec = bundle.info.image
    keys = labelled_keys(source)  # all photos may be more than memory holds
    order = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    found = dict[str, tuple[NDArray[np.uint8], str | None]]()
    left = order
    while left and (lacking := _CALIBRATION + _VERIFICATION - len(found)):
        chosen, left = set(left[:lacking]), left[lacking:]
        for photo in stream_labelled(source, chosen.__contains__):
            try:
                image = decode_image(photo.content, min_side=spec.size)
                found[photo.key] = to_square(image, spec.size, spec.max_aspect), photo.label
            except MediaError as error:
                say(one_line(f"left out {photo.key}: {error}"))
    if len(found) < 16:
        raise DataError(f"{source} holds {len(found)} readable photos; give at least 16, better 500")
    kept = [key for key in order if key in found]
    calibration = kept[::5][:_CALIBRATION]
    others = [key for key in keys if key in found and key not in calibration]
    (some, rehearsal), (rest, truth) = (zip(*(found[key] for key in of), strict=True) for of in (calibration, others))
    return Proof(np.stack(some), np.stack(rest), _truth(bundle, rehearsal), _truth(bundle, truth), len(kept))


def _truth(bundle: Bundle, labels: tuple[str | None, ...]) -> NDArray[np.int64] | None:
    known = bundle.info.labels
    if not {*labels} <= {*known}:
        return None
    return np.array([known.index(str(label)) for label in labels], np.int64)


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
