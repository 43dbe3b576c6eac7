"""Random views of a photo. Each draws from its own generator, so a view depends on nothing but its seed.

Random resized crops and flips; RandAugment: Cubuk et al., 2020 (https://arxiv.org/abs/1909.13719).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["Crop", "random_crop", "random_frames"]

_GREY = (127, 127, 127)


def _affine(image: Image.Image, *terms: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR, fillcolor=_GREY)


# magnitude m in 0..1, sign s of -1 or 1
_OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, *_: image,
    lambda image, *_: ImageOps.autocontrast(image),
    lambda image, *_: ImageOps.equalize(image),
    lambda image, m, s: image.rotate(30 * m * s, Image.Resampling.BILINEAR, fillcolor=_GREY),
    lambda image, m, _: ImageOps.posterize(image, 8 - round(4 * m)),
    lambda image, m, _: ImageOps.solarize(image, 256 - round(256 * m)),
    lambda image, m, s: ImageEnhance.Color(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: _affine(image, 1, 0.3 * m * s, 0, 0, 1, 0),
    lambda image, m, s: _affine(image, 1, 0, 0, 0.3 * m * s, 1, 0),
    lambda image, m, s: _affine(image, 1, 0, 0.45 * m * s * image.width, 0, 1, 0),
    lambda image, m, s: _affine(image, 1, 0, 0, 0, 1, 0.45 * m * s * image.height),
)


class Crop(NamedTuple):
    """A part of a photo, in its pixels, and whether it is seen mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flipped: bool

    def of(self, frame: NDArray[np.uint8], size: int) -> Image.Image:
        """The part of uint8 [H,W,3], squeezed to ``size`` x ``size`` pixels."""
        image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=self[:4])
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image


def random_crop(shape: Sequence[int], min_area: float, random: np.random.Generator) -> Crop:
    """A part of [H,W,...], drawn with at least this share of the area and an aspect between 3:4 and 4:3, then cut at
    the photo's edges: of another shape than the photo it may be smaller, and of another aspect."""
    height, width = shape[:2]
    area = width * height * random.uniform(min_area, 1.0)
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width, crop_height = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = random.uniform(0, width - crop_width), random.uniform(0, height - crop_height)
    return Crop(left, top, left + crop_width, top + crop_height, random.random() < 0.5)


def random_frames(
    frames: NDArray[np.uint8],
    size: int,
    *,
    min_area: float,
    operations: int,
    magnitude: float,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """uint8 [T,H,W,3] -> uint8 [T,size,size,3]: the same crop, flip and operations for every frame."""
    crop = random_crop(frames.shape[1:], min_area, random)
    chosen = [(int(random.integers(len(_OPERATIONS))), int(random.choice((-1, 1)))) for _ in range(operations)]

    def view(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = crop.of(frame, size)
        for number, sign in chosen:
            image = _OPERATIONS[number](image, magnitude / 10, sign)
        return np.asarray(image)

    return np.stack([view(frame) for frame in frames])
