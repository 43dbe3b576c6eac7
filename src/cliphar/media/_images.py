"""From a path, bytes, a PIL image or an array to uint8 RGB, and to the model's square."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from cliphar.errors import MediaError
from cliphar.media._folders import is_hidden
from cliphar.media._video import is_video_name

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageLike",
    "decode_image",
    "is_clip_name",
    "is_image_name",
    "is_media",
    "several",
    "to_square",
]

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.generic]

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 100_000_000
# Pillow would try every format it knows, and some of them start other programs (EPS runs Ghostscript)
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_RANGES = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}
# each for a share of all PIL images: Pillow decodes none on two threads, as of one that is given twice
_alone = tuple(threading.Lock() for _ in range(64))


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of an image format that is read here."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - in archives too


def is_clip_name(name: str) -> bool:
    """Whether a file's name has the suffix of a video, and not of an image (a GIF is a photo here)."""
    return is_video_name(name) and not is_image_name(name)


def is_media(name: str) -> bool:
    """Whether a file's name is that of a photo or a clip, and not hidden."""
    return (is_image_name(name) or is_clip_name(name)) and not is_hidden(name)


def several(images: Any) -> Iterable[Any]:
    """The images; one alone is a list of one, not the letters of its path, the rows of its array, a file's lines.

    So is what can be neither, as None, OpenCV's answer to a missing file: who decodes it says so.
    """
    if isinstance(images, np.ndarray):
        alone = images.ndim in (2, 3)
    else:
        alone = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image)
        alone = alone or hasattr(images, "read") or not isinstance(images, Iterable)
    return [images] if alone else images


def decode_image(image: ImageLike, *, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an upright RGB PIL image.

    EXIF rotation is applied, transparency is laid over white, the first frame of an animation is taken, and 16-bit,
    grey, palette and CMYK images are converted. Integers wider than 8 bits that stay below 256 or 4096 are taken for
    8-bit or 12-bit.

    Args:
        image: a path, encoded bytes, a PIL image, or an array: uint8 [H,W], [H,W,1], [H,W,3] or [H,W,4],
            or of those shapes uint16 with values 0..65535 (one that holds nothing above 255 is refused), or float
            with values in 0..1.
        min_side: a JPEG may be decoded smaller (in the DCT domain) as long as its short side keeps this many pixels;
            0 decodes it whole.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        MediaError: not an image, damaged, cut short, empty or too large.
    """
    if isinstance(image, np.ndarray):
        _check_array(image)
        return _from_array(image, max_pixels)
    if isinstance(image, Image.Image):
        with _alone[id(image) // 16 % len(_alone)], _media_errors("the image", max_pixels):
            return _to_rgb(image, "the image", max_pixels)
    if isinstance(image, bytes):
        if not image:
            raise MediaError("the image is empty (0 bytes)")
        return _open(io.BytesIO(image), "the image", min_side, max_pixels)
    if not isinstance(image, str | os.PathLike):
        raise MediaError(f"cannot take {type(image).__name__} as an image; give a path, bytes, PIL image or array")
    path = Path(image)
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{path} is empty (0 bytes)")
        with path.open("rb") as file:  # a pipe, as a shell's <(...), is read whole
            return _open(file if file.seekable() else io.BytesIO(file.read()), str(path), min_side, max_pixels)
    except (FileNotFoundError, NotADirectoryError) as error:
        if "://" in str(image):
            raise MediaError(f"{image} is an address, not a file; fetch it first, as with curl -O") from error
        raise MediaError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise MediaError(f"{path} is a directory, not an image") from error
    except PermissionError as error:
        raise MediaError(f"{path} cannot be read: permission denied") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"{str(path)!r} cannot be read: {error}") from error


def _open(file: BinaryIO, name: str, min_side: int, max_pixels: int) -> Image.Image:
    with _media_errors(name, max_pixels), Image.open(file, formats=_formats(file, name)) as opened:
        _check_size(opened.size, name, max_pixels)
        if min_side and opened.format in ("JPEG", "MPO"):
            opened.draft("RGB", (min_side, min_side))
        return _to_rgb(opened, name, max_pixels)


def _formats(file: BinaryIO, name: str) -> tuple[str, ...]:
    """Pillow's own; for what phones write as HEIC that of pillow-heif, which need not be here."""
    start = file.read(64)  # the box of brands: whoever wrote it puts heic first, or after mif1
    file.seek(0)
    if start[4:8] != b"ftyp" or not (b"heic" in start or b"heix" in start):
        return _FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise MediaError(f"{name} is HEIC; make it a JPEG, or run: pip install 'cliphar[heif]'") from error
    register_heif_opener()
    return ("HEIF",)


_quiet_lock = threading.Lock()
_quiet_users = 0
_quiet_until = ExitStack()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings: our own bound on pixels takes the place of one, the rest nobody can act on.

    The filters belong to the process, and threads that overlap in catch_warnings would leave the wrong ones behind:
    only the first in sets them and only the last out puts them back.
    """
    global _quiet_users  # noqa: PLW0603
    with _quiet_lock:
        if _quiet_users == 0:
            _quiet_until.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module="PIL")
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                _quiet_until.close()


@contextmanager
def _media_errors(name: str, max_pixels: int) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        if is_clip_name(name):
            raise MediaError(f"{name} is a video, not a photo; run 'cliphar video' on it") from error
        raise MediaError(f"{name} is not an image that can be read (or it is cut short)") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large: over {max_pixels:,} pixels; make it smaller first") from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and others
        reason = str(error) or type(error).__name__
        raise MediaError(f"{name} is damaged: {reason}") from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise MediaError(
            f"{name} is too large: {width:,} x {height:,} is over {max_pixels:,} pixels; make it smaller first"
        )


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image.size, name, max_pixels)
    upright = _upright(image)
    if upright.mode in _WIDE_RANGES:
        return _from_array(np.asarray(upright), max_pixels, name)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn as EXIF says. ImageOps.exif_transpose also writes the EXIF block anew, and fails if that is damaged."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block is no reason to refuse a photo
        turn = None
    return image if turn is None else image.transpose(turn)


def _check_array(array: NDArray[np.generic]) -> None:
    """Refuse what could only be guessed at: 0..255 in a wide type would come out black, or be stretched."""
    if array.dtype.kind in "iu" and array.dtype.str[1:] not in ("u1", "u2"):
        raise MediaError(f"the array has dtype {array.dtype}; give uint8 with values 0..255")
    if array.dtype.str[1:] == "u2" and 0 < int(array.max(initial=0)) < 256:
        raise MediaError("the array is uint16 and holds nothing above 255; give uint8, or uint16 with values 0..65535")
    if array.dtype.kind == "f" and 1 < float(array.max(initial=0)) < np.inf:
        raise MediaError("the array holds floats above 1; give floats in 0..1, or uint8 with values 0..255")


def _from_array(array: NDArray[np.generic], max_pixels: int, name: str = "the array") -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise MediaError(f"{name} has shape {array.shape}; give [H,W], [H,W,1], [H,W,3] or [H,W,4], and many as a list")
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise MediaError(f"{name} holds values that are not finite")
        scale = 255.0 / max(1.0, float(array.max()))
        pixels = np.clip(np.maximum(array, 0) * scale, 0, 255).astype(np.uint8)
    elif array.dtype == np.uint8:
        pixels = np.ascontiguousarray(array).view(np.uint8)
    elif np.issubdtype(array.dtype, np.integer):
        # cameras and tools keep 8 and 12 bits in wide types, unsaid; above 16, its own maximum
        peak = int(array.max())
        peak = next((most for most in (255, 4095, 65535) if peak <= most), peak)
        pixels = (np.clip(array, 0, None).astype(np.float64) * (255.0 / peak)).astype(np.uint8)
    else:
        raise MediaError(f"{name} has dtype {array.dtype}; give uint8 or float")
    return _to_rgb(Image.fromarray(pixels), name, max_pixels)


def to_square(image: Image.Image, size: int, max_aspect: float = 1.0) -> NDArray[np.uint8]:
    """Crop around the centre to at most ``max_aspect``, then resize: RGB PIL image -> uint8 [size,size,3]."""
    width, height = image.size
    bound = min(width, height) * max_aspect
    kept_width, kept_height = min(width, bound), min(height, bound)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))
