from __future__ import annotations

import io
import os
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cliphar.errors import MediaError
from cliphar.media import MAX_PIXELS, decode_image, files_in, is_image_name, to_square

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PROPERTY = settings(max_examples=150)
KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def scene(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth colours, as in a photo: coarse noise made large."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def corners(width: int = 32, height: int = 16) -> Image.Image:
    """Four plain quarters: red, green / blue, white."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def difference(one: Image.Image | np.ndarray, other: Image.Image | np.ndarray) -> float:
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


def refusal(image: Any, **options: Any) -> str:
    """What decode_image's refusal says, in one line."""
    with pytest.raises(MediaError) as caught:
        decode_image(image, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# what can be given


@pytest.mark.parametrize("give", ["path", "str", "bytes", "pil", "opened", "array"])
def test_every_way_to_give_an_image_gives_the_same_pixels(tmp_path: Path, give: str) -> None:
    scene().save(path := tmp_path / "a.png")
    ways: dict[str, Any] = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "pil": scene(),
        "opened": Image.open(io.BytesIO(path.read_bytes())),
        "array": np.asarray(scene()),
    }
    decoded = decode_image(ways[give])
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(scene()))


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 4),
        ("JPEG", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("AVIF", {"quality": 90}, 4),
        ("GIF", {}, 12),
    ],
)
def test_formats_are_read(kind: str, options: dict[str, Any], tolerance: float) -> None:
    decoded = decode_image(encode(scene(), kind, **options))
    assert decoded.mode == "RGB"
    assert decoded.size == scene().size
    assert difference(decoded, scene()) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_the_content_counts_not_the_name(tmp_path: Path, kind: str) -> None:
    (path := tmp_path / "a.gif").write_bytes(encode(scene(), kind))
    assert decode_image(path).size == scene().size
    path.write_bytes(b"x")
    assert "not an image" in refusal(path)


def test_the_given_image_is_left_as_it_was() -> None:
    image = scene().copy()
    decode_image(image).paste(BLUE, (0, 0, 96, 64))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(scene()))
    array = np.array(scene())
    decode_image(array).paste(BLUE, (0, 0, 96, 64))
    np.testing.assert_array_equal(array, np.asarray(scene()))


def test_image_names() -> None:
    for name in ("a.jpg", "A.JPEG", "dir.x/b.webp", "c.tar.png", "x/y.AVIF"):
        assert is_image_name(name)
    for name in ("", "jpg", "a.txt", "a.jpg.txt", "photos.jpg/readme", ".jpg", "a."):
        assert not is_image_name(name)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="a pipe has no path here")
def test_a_pipe_is_read_too() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "wb") as file:
        file.write(encode(scene(), "PNG"))
        file.close()
        assert decode_image(f"/dev/fd/{reader}").size == (96, 64)


# what is refused


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert refusal(tmp_path / "a.jpg") == f"{tmp_path / 'a.jpg'} is empty (0 bytes)"
    assert "empty" in refusal(b"")


def test_a_missing_file_does_not_exist(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jpg") == f"{tmp_path / 'a.jpg'} does not exist"
    assert "does not exist" in refusal("nowhere/at/all.jpg")


def test_a_directory_is_called_that(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a directory, not an image"
    assert "directory" in refusal("")


@pytest.mark.parametrize("name", ["photo.jpg/below.jpg", "n" * 400 + ".jpg", "nul\0.jpg", "loop"], ids=lambda n: n[:9])
def test_paths_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(encode(scene(), "JPEG"))
    (tmp_path / "loop").symlink_to("loop")
    refusal(tmp_path / name)
    refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    "thing", [None, 3, 2.5, [[1, 2], [3, 4]], bytearray(b"x"), object()], ids=lambda x: str(type(x))
)
def test_other_types_are_named(thing: Any) -> None:
    assert f"cannot take {type(thing).__name__}" in refusal(thing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.01, 0.1, 0.3, 0.5, 0.8, 0.95])
def test_an_image_cut_short_is_refused(tmp_path: Path, kind: str, kept: float) -> None:
    content = encode(scene(), kind)
    (path := tmp_path / "cut").write_bytes(content[: max(1, int(len(content) * kept))])
    assert str(path) in refusal(path)
    refusal(path.read_bytes(), min_side=16)


@pytest.mark.parametrize("kept", [0.5, 0.8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_pil_image_cut_short_is_refused(kind: str, kept: float) -> None:
    content = encode(scene(), kind)
    refusal(Image.open(io.BytesIO(content[: int(len(content) * kept)])))


def test_a_closed_pil_image_is_refused() -> None:
    image = Image.open(io.BytesIO(encode(scene(), "PNG")))
    image.close()
    refusal(image)


@PROPERTY
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
    head=st.booleans(),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
    min_side=st.sampled_from([0, 16]),
)
def test_damage_gives_a_media_error_or_an_image(
    kind: str, flips: list[tuple[float, int]], head: bool, kept: float, min_side: int
) -> None:
    content = bytearray(encode(scene(), kind))
    for position, mask in flips:
        content[int(position * (min(64, len(content)) if head else len(content)))] ^= mask
    try:
        image = decode_image(bytes(content[: int(len(content) * kept)]), min_side=min_side, max_pixels=100_000)
    except MediaError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
        assert to_square(image, 16).shape == (16, 16, 3)


@PROPERTY
@given(st.binary(max_size=200))
def test_random_bytes_give_a_media_error(content: bytes) -> None:
    refusal(content)


def test_formats_that_run_other_programs_are_not_tried() -> None:
    assert "not an image that can be read" in refusal(encode(corners(), "EPS"))


# size


def png_of(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    content = bytearray(encode(corners(), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp_of(width: int, height: int) -> bytes:
    content = bytearray(encode(corners(), "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (12_000, 9_000), (65_000, 2_000)])
@pytest.mark.parametrize("make", [png_of, jpeg_of, bmp_of])
@pytest.mark.parametrize("min_side", [0, 224])
def test_a_bomb_is_refused_before_it_is_decoded(
    make: Callable[[int, int], bytes], width: int, height: int, min_side: int
) -> None:
    content = make(width, height)
    assert len(content) < 10_000
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    message = refusal(content, min_side=min_side)
    assert time.process_time() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # KiB; decoded it is 300 MB and more
    assert "too large" in message
    assert f"{MAX_PIXELS:,}" in message


def test_max_pixels_is_the_last_size_that_is_taken() -> None:
    content = encode(scene(), "PNG")
    assert decode_image(content, max_pixels=96 * 64).size == (96, 64)
    assert "96 x 64 is over 6,143 pixels" in refusal(content, max_pixels=96 * 64 - 1)


@pytest.mark.parametrize(
    "image", [scene(), np.asarray(scene()), np.zeros((64, 96), np.float32)], ids=lambda x: str(type(x))
)
def test_max_pixels_holds_for_images_in_memory(image: Any) -> None:
    assert decode_image(image, max_pixels=96 * 64).size == (96, 64)
    assert "too large" in refusal(image, max_pixels=96 * 64 - 1)


# modes


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless))
    assert decoded.size == (20, 10)
    assert difference(decoded, frames[0]) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    decoded = decode_image(encode(corners(64, 32).convert("CMYK"), kind, quality=95))
    assert decoded.mode == "RGB"
    assert difference(decoded.crop((2, 2, 30, 14)), Image.new("RGB", (28, 12), RED)) < 8
    assert difference(decoded.crop((34, 18, 62, 30)), Image.new("RGB", (28, 12), WHITE)) < 8


@pytest.mark.parametrize("full", [65535, 4095, 255])
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I")])
def test_wide_greys_keep_their_greys(kind: str, mode: str, full: int) -> None:
    values = np.arange(256).reshape(16, 16)
    wide = np.negative(values * -full // 255).astype(np.int32 if mode == "I" else np.uint16)
    content = encode(Image.fromarray(wide), kind)
    assert Image.open(io.BytesIO(content)).mode == mode
    np.testing.assert_array_equal(np.asarray(decode_image(content))[:, :, 1], values)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_wide_pil_modes_keep_mid_grey(mode: str) -> None:
    decoded = np.asarray(decode_image(Image.new(mode, (3, 3), 32768)))
    assert set(decoded.ravel().tolist()) <= {127, 128}


@pytest.mark.parametrize(("peak", "mid"), [(1.0, 0.5), (1000.0, 500.0)])
def test_a_float_tiff_keeps_its_greys(peak: float, mid: float) -> None:
    values = np.array([[0, mid, peak, -1]], np.float32)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
    np.testing.assert_allclose(decoded[0, :, 0], [0, 127.5, 255, 0], atol=1)


def test_a_float_tiff_with_holes_is_refused() -> None:
    values = np.array([[0.5, np.nan, np.inf]], np.float32)
    assert "not finite" in refusal(encode(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit_becomes_black_and_white(kind: str) -> None:
    bits = np.array([[0, 1, 0, 1, 1, 0, 0, 1]], bool)
    decoded = np.asarray(decode_image(encode(Image.fromarray(bits), kind)))
    np.testing.assert_array_equal(decoded, np.repeat(bits[:, :, None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    decoded = np.asarray(decode_image(encode(scene().convert("L"), kind)), np.int16)
    assert decoded.shape == (64, 96, 3)
    assert np.ptp(decoded, axis=2).max() <= 3


@pytest.mark.parametrize(("kind", "alphas"), [("PNG", "one colour"), ("PNG", "per colour"), ("GIF", "one colour")])
def test_a_transparent_palette_entry_shows_white(kind: str, alphas: str) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.paste(1, (2, 0, 4, 2))
    transparency = 1 if alphas == "one colour" else b"\xff\x00"
    decoded = decode_image(encode(image, kind, transparency=transparency))
    assert decoded.getpixel((0, 0)) == RED
    assert decoded.getpixel((3, 0)) == WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "transparency"), [("RGB", (10, 20, 30), (10, 20, 30)), ("L", 7, 7), ("1", 0, 0)]
)
def test_a_colour_declared_transparent_shows_white(mode: str, colour: Any, transparency: Any) -> None:
    content = encode(Image.new(mode, (4, 4), colour), "PNG", transparency=transparency)
    assert decode_image(content).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "pil", "array"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (255, BLUE), (128, (127, 127, 255))])
def test_rgba_is_laid_over_white(kind: str, alpha: int, expected: tuple[int, int, int]) -> None:
    image = Image.new("RGBA", (4, 4), (*BLUE, alpha))
    if kind in ("pil", "array"):
        decoded = decode_image(image if kind == "pil" else np.asarray(image))
    else:
        decoded = decode_image(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert decoded.mode == "RGB"
    np.testing.assert_allclose(np.asarray(decoded)[1, 1], expected, atol=1)


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 100), (128, 177)])
def test_grey_with_alpha_is_laid_over_white(alpha: int, expected: int) -> None:
    decoded = decode_image(encode(Image.new("LA", (4, 4), (100, alpha)), "PNG"))
    np.testing.assert_allclose(np.asarray(decoded)[1, 1], [expected] * 3, atol=1)


MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16B I;16L"


@pytest.mark.parametrize("mode", MODES.split())
def test_every_pil_mode_gives_an_image_or_a_media_error(mode: str) -> None:
    try:
        decoded = decode_image(Image.new(mode, (3, 2)))
    except MediaError as error:
        assert mode == "La", error  # Pillow has no way from it
    else:
        assert (decoded.mode, decoded.size) == ("RGB", (3, 2))


# orientation

TURNED_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(upright: Image.Image, orientation: int, kind: str) -> bytes:
    """A camera's file: pixels as the sensor lay, and the EXIF tag that says how."""
    stored = upright.transpose(TURNED_BY[orientation]) if orientation in TURNED_BY else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a test"
    return encode(stored, kind, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_exif_orientation_ends_upright(orientation: int, kind: str) -> None:
    upright = corners(64, 32)
    decoded = decode_image(turned(upright, orientation, kind))
    assert decoded.size == (64, 32)
    assert difference(decoded, upright) < 6


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_holds_when_decoded_smaller(orientation: int) -> None:
    decoded = decode_image(turned(corners(512, 256), orientation, "JPEG"), min_side=60)
    assert decoded.size == (128, 64)
    assert difference(decoded, corners(128, 64)) < 6


def test_exif_orientation_of_an_opened_pil_image_is_applied() -> None:
    image = Image.open(io.BytesIO(turned(corners(64, 32), 6, "JPEG")))
    assert image.size == (32, 64)
    assert decode_image(image).size == (64, 32)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    assert difference(decode_image(turned(corners(64, 32), orientation, "JPEG")), corners(64, 32)) < 6


def with_damaged_exif(flips: list[tuple[int, int]], kept: int | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * 20
    exif[0x0112] = 6
    exif[0x011A] = 1.5
    block = bytearray(exif.tobytes())
    for position, value in flips:
        block[position] = value
    return encode(Image.new("RGB", (8, 6), RED), "JPEG", exif=bytes(block[:kept]))


@pytest.mark.parametrize(("position", "value"), [(17, 0), (17, 26), (17, 84), (41, 13), (43, 1)])
def test_an_exif_block_that_cannot_be_written_again_still_turns_the_photo(position: int, value: int) -> None:
    assert decode_image(with_damaged_exif([(position, value)])).size == (6, 8)


@PROPERTY
@given(st.lists(st.tuples(st.integers(6, 85), st.integers(0, 255)), max_size=6), st.integers(0, 86))
def test_a_damaged_exif_block_does_not_cost_the_photo(flips: list[tuple[int, int]], kept: int) -> None:
    assert sorted(decode_image(with_damaged_exif(flips, kept)).size) == [6, 8]


# arrays


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_arrays_of_every_shape_and_type(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if shape[-1] == 4:
        values[:, :, 3] = 255
    array = values if dtype is np.uint8 else (values / 255).astype(dtype)
    decoded = np.asarray(decode_image(array))
    expected = np.broadcast_to(values.reshape(5, 7, -1)[:, :, :3], (5, 7, 3))
    assert decoded.shape == (5, 7, 3)
    np.testing.assert_allclose(decoded, expected, atol=0 if dtype is np.uint8 else 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_greys_come_back_exactly(dtype: type[np.generic]) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(decode_image((values / 255).astype(dtype)))[:, :, 0], values)


def test_floats_under_zero_are_black() -> None:
    values = np.array([[-1.0, -np.finfo(np.float32).max, 0.0, 1.0]], np.float32)
    np.testing.assert_array_equal(np.asarray(decode_image(values))[0, :, 0], [0, 0, 0, 255])


def test_an_all_black_float_array_is_black() -> None:
    assert np.asarray(decode_image(np.zeros((2, 2, 3)))).max() == 0


@pytest.mark.parametrize("step", [np.s_[::-1], np.s_[:, ::2], np.s_[:, :, ::-1], np.s_[5:20, 3:]], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_views_and_read_only_arrays_are_taken(step: Any, dtype: type[np.generic]) -> None:
    array = (np.asarray(scene()) / (1 if dtype is np.uint8 else 255)).astype(dtype)[step]
    array.flags.writeable = False
    expected = np.asarray(scene())[step]
    np.testing.assert_allclose(np.asarray(decode_image(array)), expected, atol=0 if dtype is np.uint8 else 1)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_uint16_arrays(dtype: str) -> None:
    values = np.arange(256, dtype=dtype).reshape(16, 16)
    assert "uint16" in refusal(values)
    np.testing.assert_array_equal(np.asarray(decode_image((values * 257).astype(dtype)))[:, :, 0], values)


@pytest.mark.parametrize(
    "shape", [(), (3,), (2, 3, 2), (2, 3, 5), (3, 2, 2, 3), (0, 4), (4, 0, 3), (0, 0), (4, 4, 0), (3, 8, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    message = refusal(np.zeros(shape, dtype))
    assert f"shape {shape}" in message or "no pixels" in message


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_arrays_with_holes_are_refused(hole: float, everywhere: bool) -> None:
    array = np.full((4, 4, 3), 0.5, np.float32)
    array[...] = hole if everywhere else array
    array[1, 2, 0] = hole
    assert "not finite" in refusal(array)


@pytest.mark.parametrize("dtype", [bool, np.complex64, object, "U1", "datetime64[s]"], ids=str)
def test_arrays_of_other_types_are_refused_by_name(dtype: Any) -> None:
    array = np.zeros((4, 4), dtype)
    assert f"dtype {array.dtype}" in refusal(array)


# smaller decoding


@pytest.mark.parametrize("min_side", [1, 16, 48, 56, 59, 100, 224, 225])
@pytest.mark.parametrize(
    ("width", "height"), [(94, 94), (376, 376), (446, 447), (449, 449), (501, 333), (333, 501), (97, 640), (1, 300)]
)
def test_a_jpeg_decoded_smaller_keeps_min_side(width: int, height: int, min_side: int) -> None:
    decoded = decode_image(encode(scene(width, height), "JPEG"), min_side=min_side)
    assert min(decoded.size) >= min(min_side, width, height)
    assert decoded.width <= width
    assert decoded.height <= height


@settings(PROPERTY, max_examples=60)
@given(min_side=st.integers(1, 64), factor=st.integers(1, 8), more=st.integers(-8, 8), long=st.integers(0, 60))
def test_min_side_holds_close_to_its_multiples(min_side: int, factor: int, more: int, long: int) -> None:
    short = max(1, min_side * factor + more)
    decoded = decode_image(encode(Image.new("L", (short + long, short)), "JPEG"), min_side=min_side)
    assert min(decoded.size) >= min(min_side, short)


def test_a_large_jpeg_is_decoded_smaller_and_others_are_not() -> None:
    large = scene(800, 640)
    assert decode_image(encode(large, "JPEG"), min_side=80).size == (100, 80)
    assert decode_image(encode(large, "JPEG")).size == (800, 640)
    assert decode_image(encode(large, "PNG"), min_side=80).size == (800, 640)


@pytest.mark.parametrize("min_side", [112, 224])
@pytest.mark.parametrize(("width", "height"), [(1001, 701), (701, 1001), (1024, 768), (460, 460)])
@pytest.mark.parametrize("max_aspect", [1.0, 1.25])
def test_smaller_decoding_looks_like_full_decoding(width: int, height: int, min_side: int, max_aspect: float) -> None:
    """Not the same to the pixel: libjpeg rounds the smaller size up, which shifts odd sizes by a part of a pixel."""
    content = encode(scene(width, height), "JPEG", quality=92)
    whole = to_square(decode_image(content), min_side, max_aspect)
    decoded = decode_image(content, min_side=min_side)
    assert decoded.width < width
    small = to_square(decoded, min_side, max_aspect)
    assert difference(whole, small) < 2
    assert np.abs(whole.astype(np.int16) - small).max() < 16


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_smaller_decoding_keeps_other_jpeg_modes(mode: str) -> None:
    content = encode(scene(400, 300).convert(mode), "JPEG", quality=95)
    whole, small = decode_image(content), decode_image(content, min_side=64)
    assert small.mode == "RGB"
    assert small.width < whole.width
    assert difference(to_square(whole, 32), to_square(small, 32)) < 3


# threads


def test_decoding_in_threads_leaves_the_warning_filters_alone() -> None:
    content = encode(scene(200, 200), "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: decode_image(content).size, range(300)))
    assert sizes == [(200, 200)] * 300
    assert list(warnings.filters) == before


# the square


@pytest.mark.parametrize("size", [16, 33, 224])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 300), (300, 1), (2, 5), (33, 33), (640, 480), (480, 640), (1, 5000), (3000, 2)]
)
@pytest.mark.parametrize("max_aspect", [1.0, 1.25, 4.0])
def test_the_square_is_exact(width: int, height: int, size: int, max_aspect: float) -> None:
    square = to_square(Image.new("RGB", (width, height), (10, 200, 30)), size, max_aspect)
    assert isinstance(square, np.ndarray)
    assert square.dtype == np.uint8
    assert square.shape == (size, size, 3)
    assert square.flags.c_contiguous
    np.testing.assert_array_equal(square.reshape(-1, 3), [(10, 200, 30)] * size**2)


@settings(PROPERTY, max_examples=80)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(16, 64), st.floats(1, 4))
def test_any_size_can_be_squared(width: int, height: int, size: int, max_aspect: float) -> None:
    assert to_square(Image.new("RGB", (width, height)), size, max_aspect).shape == (size, size, 3)


def bands(colours: list[tuple[int, int, int]], step: int, height: int) -> Image.Image:
    image = Image.new("RGB", (step * len(colours), height))
    for i, colour in enumerate(colours):
        image.paste(colour, (i * step, 0, (i + 1) * step, height))
    return image


@pytest.mark.parametrize("portrait", [False, True])
@pytest.mark.parametrize(
    ("max_aspect", "expected"),
    [
        (1.0, [GREEN]),
        (2.0, [WHITE, GREEN, GREEN, WHITE]),
        (3.0, [WHITE, GREEN, WHITE]),
        (4.0, [RED, WHITE, WHITE, GREEN, GREEN, WHITE, WHITE, BLUE]),
    ],
)
def test_only_the_centre_is_kept(portrait: bool, max_aspect: float, expected: list[tuple[int, int, int]]) -> None:
    image = bands([RED, RED, WHITE, WHITE, GREEN, GREEN, WHITE, WHITE, BLUE, BLUE], 40, 80)  # five times as wide
    square = to_square(image.transpose(Image.Transpose.TRANSPOSE) if portrait else image, 96, max_aspect)
    if portrait:
        square = square.swapaxes(0, 1)
    step = 96 // len(expected)
    for i, colour in enumerate(expected):
        middle = square[:, i * step + 4 : (i + 1) * step - 4]
        assert difference(middle, np.broadcast_to(np.array(colour, np.uint8), middle.shape)) < 3


@pytest.mark.parametrize("portrait", [False, True])
@pytest.mark.parametrize("max_aspect", [1.0, 1.25, 1.7, 3.0, 4.0])
def test_the_crop_lies_where_it_should_to_the_pixel(portrait: bool, max_aspect: float) -> None:
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (80, 240, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp.swapaxes(0, 1) if portrait else ramp))
    square = to_square(image, 40, max_aspect).astype(float)
    if portrait:
        square = square.swapaxes(0, 1)
    kept = min(240.0, 80 * max_aspect)
    expected = (240 - kept) / 2 + (np.arange(40) + 0.5) * kept / 40 - 0.5
    np.testing.assert_allclose(square[20, 2:-2, 0], expected[2:-2], atol=1)
    assert np.ptp(square, axis=0).max() <= 1


def test_the_side_within_the_bound_is_kept_whole() -> None:
    square = to_square(bands([RED, GREEN, BLUE], 40, 100), 48, 1.25)
    assert square[24, [2, 24, -3]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_an_image_of_the_right_size_is_unchanged() -> None:
    np.testing.assert_array_equal(to_square(scene(64, 64), 64), np.asarray(scene(64, 64)))


def test_a_folder_holds_what_its_links_lead_to_and_nothing_that_tools_hid_there(tmp_path: Path) -> None:
    inside, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for folder in (inside / "b", inside / ".git", inside / "lost+found", elsewhere):
        folder.mkdir(parents=True)
    for file in ("b/1.jpg", "b/._1.jpg", ".git/2.jpg", "lost+found/#12.jpg", "a.jpg", "../elsewhere/3.jpg"):
        (inside / file).touch()
    (inside / "c").symlink_to(elsewhere)
    (inside / "d").symlink_to(elsewhere)
    (inside / "gone.jpg").symlink_to("nowhere.jpg")
    for place, leads_to in (("b/up", ".."), ("../elsewhere/round", "../set"), ("b/out", "../.."), ("itself", "itself")):
        (inside / place).symlink_to(leads_to)
    os.mkfifo(inside / "pipe.jpg")
    found = [file.relative_to(inside).as_posix() for file in files_in(inside)]
    assert found == ["a.jpg", "b/1.jpg", "c/3.jpg", "d/3.jpg", "gone.jpg", "itself"]
