from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cliphar.data import (
    Photo,
    difference_hash,
    group_duplicates,
    list_labelled,
    open_source,
    read_captioned,
    read_labelled,
    split_grouped,
)
from cliphar.errors import DataError


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Smooth colours, as in a photo: coarse noise made large."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def hash_of(image: Image.Image) -> np.ndarray:
    return difference_hash(np.asarray(image))


def distance(one: Image.Image, other: Image.Image) -> int:
    return int((hash_of(one) != hash_of(other)).sum())


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The message of a refusal, which must be one line and name the path."""
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# hashes


def test_a_hash_is_128_bits() -> None:
    found = hash_of(scene(0))
    assert found.shape == (128,)
    assert found.dtype == np.bool_


def test_a_hash_sees_both_directions() -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    across = difference_hash(np.ascontiguousarray(ramp))
    down = difference_hash(np.ascontiguousarray(ramp.swapaxes(0, 1)))
    assert across.tolist() == [True] * 64 + [False] * 64
    assert down.tolist() == [False] * 64 + [True] * 64


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("width", "height"), [(320, 240), (80, 60), (97, 71), (200, 120)])
def test_a_hash_survives_a_resize(seed: int, width: int, height: int) -> None:
    assert distance(scene(seed), scene(seed).resize((width, height), Image.Resampling.LANCZOS)) <= 12


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("quality", [95, 75, 40, 20])
def test_a_hash_survives_recompression(seed: int, quality: int) -> None:
    assert distance(scene(seed), Image.open(io.BytesIO(jpeg(scene(seed), quality)))) <= 12


@pytest.mark.parametrize("seed", range(5))
def test_a_hash_survives_a_change_of_brightness(seed: int) -> None:
    darker = scene(seed).point(lambda value: int(value * 0.8 + 10))
    assert distance(scene(seed), darker) <= 12


def test_different_scenes_have_different_hashes() -> None:
    hashes = [hash_of(scene(seed)) for seed in range(40)]
    distances = [int((a != b).sum()) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 24
    assert 56 < np.mean(distances) < 72


def test_a_mirrored_scene_is_another() -> None:
    assert distance(scene(1), ImageOps.mirror(scene(1))) > 24


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 200), (200, 1), (3, 3)])
def test_small_images_have_a_hash(width: int, height: int) -> None:
    assert hash_of(scene(0, width, height)).shape == (128,)


# groups


def bits(*flipped: int) -> np.ndarray:
    found = np.zeros(128, np.bool_)
    found[list(flipped)] = True
    return found


def test_copies_share_a_group_and_others_do_not() -> None:
    images = [
        scene(0),
        scene(1),
        scene(0).resize((80, 60)),
        scene(2),
        Image.open(io.BytesIO(jpeg(scene(1), 40))),
        Image.open(io.BytesIO(jpeg(scene(0), 40))),
    ]
    groups = group_duplicates([hash_of(image) for image in images])
    assert groups.dtype == np.int64
    assert groups.shape == (6,)
    assert groups[0] == groups[2] == groups[5]
    assert groups[1] == groups[4]
    assert len(set(groups.tolist())) == 3


@pytest.mark.parametrize(("apart", "together"), [(0, True), (11, True), (12, True), (13, False), (64, False)])
def test_twelve_bits_are_the_limit(apart: int, together: bool) -> None:
    groups = group_duplicates([bits(), bits(*range(apart))])
    assert (groups[0] == groups[1]) == together


@pytest.mark.parametrize("max_distance", [0, 1, 5])
def test_the_limit_can_be_set(max_distance: int) -> None:
    hashes = [bits(), bits(*range(max_distance)), bits(*range(100, 101 + max_distance))]
    groups = group_duplicates(hashes, max_distance)
    assert groups[0] == groups[1] != groups[2]


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_is_one_group_in_any_order(seed: int) -> None:
    chain = [bits(*range(10 * step)) for step in range(12)]  # its ends are 110 bits apart
    order = np.random.default_rng(seed).permutation(len(chain))
    groups = group_duplicates([chain[i] for i in order])
    assert len(set(groups.tolist())) == 1


def test_two_chains_stay_apart() -> None:
    one = [bits(*range(10 * step)) for step in range(4)]
    other = [bits(*range(60, 60 + 40), *range(100, 100 + 7 * step)) for step in range(4)]
    mixed = [photo for pair in zip(one, other, strict=True) for photo in pair]
    groups = group_duplicates(mixed).tolist()
    assert len(set(groups[::2])) == len(set(groups[1::2])) == 1
    assert groups[0] != groups[1]


def test_duplicates_are_found_across_blocks() -> None:
    random = np.random.default_rng(0)
    hashes = list(random.random((2200, 128)) < 0.5)
    hashes[2150] = hashes[3]
    hashes[1030] = hashes[1020]
    groups = group_duplicates(hashes)
    assert groups[2150] == groups[3]
    assert groups[1030] == groups[1020]
    assert len(set(groups.tolist())) == 2198


def test_one_photo_and_none() -> None:
    assert len(group_duplicates([bits()])) == 1
    assert group_duplicates([]).shape == (0,)
    assert group_duplicates([]).dtype == np.int64


@given(st.lists(st.lists(st.integers(0, 127), max_size=30), min_size=1, max_size=25), st.integers(0, 30))
def test_groups_are_the_connected_parts(flipped: list[list[int]], max_distance: int) -> None:
    hashes = [bits(*some) for some in flipped]
    reached = list(range(len(hashes)))
    for _ in hashes:
        for a, one in enumerate(hashes):
            for b, other in enumerate(hashes):
                if (one != other).sum() <= max_distance:
                    reached[a] = reached[b] = min(reached[a], reached[b])
    groups = group_duplicates(hashes, max_distance)
    assert np.array_equal(groups[:, None] == groups, np.equal.outer(reached, reached))


# splits

FRACTIONS = [(0.84, 0.08, 0.08), (0.5, 0.5), (1.0,), (0.0, 1.0), (0.9, 0.0, 0.1), (0.1,) * 10]


@pytest.mark.parametrize("fractions", FRACTIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 7])
def test_each_stratum_is_divided_by_the_fractions(fractions: tuple[float, ...], seed: int) -> None:
    strata = ["often"] * 500 + ["seldom"] * 50 + ["rare"] * 3 + ["once"]
    parts = split_grouped(strata, np.arange(len(strata)), fractions, seed)
    assert parts.dtype == np.int64
    for stratum, total in Counter(strata).items():
        found = Counter(part for part, its in zip(parts.tolist(), strata, strict=True) if its == stratum)
        for part, fraction in enumerate(fractions):
            assert abs(found[part] - fraction * total) <= 1
            assert fraction > 0 or found[part] == 0


@given(
    photos=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=80),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 2**32),
)
def test_groups_never_straddle_parts(photos: list[tuple[str, int]], fractions: tuple[float, ...], seed: int) -> None:
    strata, groups = [label for label, _ in photos], np.array([group for _, group in photos], np.int64)
    parts = split_grouped(strata, groups, fractions, seed)
    assert parts.shape == (len(photos),)
    part_of: dict[int, set[int]] = defaultdict(set)
    for group, part in zip(groups.tolist(), parts.tolist(), strict=True):
        part_of[group].add(part)
        assert fractions[part] > 0
    assert all(len(found) == 1 for found in part_of.values())
    np.testing.assert_array_equal(parts, split_grouped(strata, groups, fractions, seed))


@pytest.mark.parametrize("photos", [6, 8, 9, 10, 13])
def test_few_photos_of_each_label_still_fill_every_part(photos: int) -> None:
    strata = [label for label in "abc" for _ in range(photos)]
    parts = split_grouped(strata, np.arange(len(strata)), (0.84, 0.08, 0.08), 7)
    assert set(parts.tolist()) == {0, 1, 2}


@given(st.lists(st.integers(1, 4), min_size=20, max_size=60), st.integers(0, 1000))
def test_small_groups_move_the_fractions_by_little(sizes: list[int], seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    parts = split_grouped(["a"] * len(groups), groups, (0.6, 0.4), seed)
    strayed = sum(size for size in sizes if size > 1)
    assert abs((parts == 0).sum() - 0.6 * len(groups)) <= 1 + strayed
    assert 0 < (parts == 0).mean() < 1


def test_frames_that_are_all_alike_are_grouped_in_no_time() -> None:
    started = time.process_time()  # what others do on the machine does not count
    assert set(group_duplicates([np.zeros(128, np.bool_)] * 4000).tolist()) == {0}
    assert time.process_time() - started < 10  # pair by pair it is half a minute


@pytest.mark.parametrize("size", [2, 5, 10])
def test_a_set_of_bursts_fills_every_part_as_one_of_single_photos_does(size: int) -> None:
    groups = np.repeat(np.arange(600 // size), size)
    parts = split_grouped((groups % 3).tolist(), groups, (0.84, 0.08, 0.08), 7)
    assert np.abs(np.bincount(parts) / 600 - (0.84, 0.08, 0.08)).max() <= size / 200


def test_seeds_give_the_same_split_or_another() -> None:
    strata, groups = ["a", "b"] * 100, np.arange(200)
    one = split_grouped(strata, groups, (0.5, 0.5), 1)
    np.testing.assert_array_equal(one, split_grouped(strata, groups, (0.5, 0.5), 1))
    assert (one != split_grouped(strata, groups, (0.5, 0.5), 2)).any()


def test_a_stratum_does_not_move_when_a_later_one_changes() -> None:
    one = split_grouped(["a"] * 50 + ["b"] * 50, np.arange(100), (0.5, 0.5), 3)
    other = split_grouped(["a"] * 50 + ["b"] * 20, np.arange(70), (0.5, 0.5), 3)
    np.testing.assert_array_equal(one[:50], other[:50])


def test_a_group_that_spans_labels_goes_to_one_part() -> None:
    strata = ["a"] * 50 + ["b"] * 50
    parts = split_grouped(strata, np.tile(np.arange(50), 2), (0.5, 0.5), 0)
    np.testing.assert_array_equal(parts[:50], parts[50:])


def test_nothing_is_split_into_nothing() -> None:
    assert split_grouped([], np.array([], np.int64), (0.5, 0.5), 0).shape == (0,)


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.6), (8, 1, 1)], ids=str)
def test_fractions_must_sum_to_one(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split_grouped(["a"], np.array([0]), fractions, 0)


# sources

TREE = {
    "sit-up/b.jpg": b"1",
    "sit-up/a.PNG": b"2",
    "sit/a.jpg": b"3",
    "riding__a_bike/x y.webp": b"4",
    "riding_a_bike/notes.txt": b"no photo",
    "E\u0301tude/ü.jpeg": b"5",
}
LABELLED = [
    ("E\u0301tude/ü.jpeg", "Étude"),
    ("riding__a_bike/x y.webp", "riding a bike"),
    ("sit/a.jpg", "sit"),
    ("sit-up/a.PNG", "sit-up"),
    ("sit-up/b.jpg", "sit-up"),
]


def plant(root: Path, tree: dict[str, bytes]) -> Path:
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path: Path, tree: dict[str, bytes], prefix: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in tree.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("source", ["folder", "tar", "tar.gz", "tar.xz", "packed by tarfile"])
def test_labelled_photos_of_a_folder_and_of_its_tar_are_the_same(tmp_path: Path, source: str) -> None:
    folder = plant(tmp_path / "data", TREE)
    if source == "folder":
        photos = read_labelled(folder)
    elif source == "packed by tarfile":
        with tarfile.open(tmp_path / "d.tar", "w") as tar:
            tar.add(folder, "data")
        photos = read_labelled(tmp_path / "d.tar")
    else:
        mode = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[source]
        photos = read_labelled(pack(tmp_path / "d.tar", TREE, "data/", mode))
    assert photos == [Photo(f"data/{name}", TREE[name], label) for name, label in LABELLED]


@pytest.mark.parametrize("prefix", ["", "./", "deep/er/"])
def test_a_tar_needs_no_top_folder(tmp_path: Path, prefix: str) -> None:
    photos = read_labelled(pack(tmp_path / "d.tar", TREE, prefix))
    assert [(photo.content, photo.label) for photo in photos] == [(TREE[name], label) for name, label in LABELLED]
    assert "Étude" in {photo.label for photo in open_source(str(tmp_path / "d.tar")).read()}


def test_photos_of_a_tar_without_a_label_folder_are_no_labelled_photos(tmp_path: Path) -> None:
    assert "LABEL/PHOTO" in refusal(read_labelled, pack(tmp_path / "d.tar", {"a.jpg": b"1", "b.jpg": b"2"}))


def test_the_second_name_of_a_file_is_a_photo_too(tmp_path: Path) -> None:
    folder = plant(tmp_path / "data", {"sit/a.jpg": b"1", "run/b.jpg": b"2"})
    (folder / "run" / "a.jpg").hardlink_to(folder / "sit" / "a.jpg")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(folder, "data")
    assert list(open_source(str(tmp_path / "d.tar")).read()) == list(open_source(str(folder)).read())


def test_of_a_compressed_tar_nothing_is_unpacked_twice_for_its_order(tmp_path: Path) -> None:
    names = [f"sit/{i}.jpg" for i in (3, 1, 2, 0)]
    path = pack(tmp_path / "d.tar", dict.fromkeys(names, b"1"), mode="w:gz")
    assert [photo.key for photo in open_source(str(path)).read()] == names


def test_what_a_mac_puts_beside_each_file_of_a_shard_is_passed_over(tmp_path: Path) -> None:
    tree = {"./._1.jpg": b"x", "./1.jpg": b"1", "./._1.cls": b"x", "./1.cls": b"sit"}
    (photo,) = open_source(str(pack(tmp_path / "d.tar", tree))).read()
    assert (photo.content, photo.label) == (b"1", "sit")


def test_links_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    path = pack(tmp_path / "d.tar", {"sit/a.jpg": b"1"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("sit/b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [photo.key for photo in read_labelled(path)] == ["sit/a.jpg"]


def test_a_link_to_a_folder_of_photos_is_followed_and_one_to_nothing_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sit").symlink_to(plant(tmp_path / "elsewhere", {"a.jpg": b"1"}))
    assert read_labelled(tmp_path / "data") == [Photo("data/sit/a.jpg", b"1", "sit")]
    (tmp_path / "data" / "b.jpg").symlink_to("nothing")
    assert "b.jpg cannot be read: No such file" in refusal(read_labelled, tmp_path / "data")


@pytest.mark.parametrize("read", [read_labelled, read_captioned])
def test_a_path_that_is_neither_folder_nor_tar_is_refused(tmp_path: Path, read: Callable[[Path], list[Photo]]) -> None:
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    for path in (tmp_path / "absent", tmp_path / "a.txt"):
        assert "neither a folder nor a tar file" in refusal(read, path)


@pytest.mark.parametrize("read", [read_labelled, read_captioned])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_a_tar_cut_short_is_refused(
    tmp_path: Path, read: Callable[[Path], list[Photo]], mode: str, kept: float
) -> None:
    noise = np.random.default_rng(0).bytes(20_000)
    content = pack(tmp_path / "d.tar", {f"sit/{i}.jpg": noise for i in range(5)}, mode=mode).read_bytes()
    (tmp_path / "d.tar").write_bytes(content[: int(len(content) * kept)])
    assert "copy it again" in refusal(read, tmp_path / "d.tar")


@pytest.mark.parametrize("tree", [{}, {"sit/notes.txt": b"x"}], ids=["empty", "no photos"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_no_labelled_photos_say_what_was_expected(tmp_path: Path, tree: dict[str, bytes], kind: str) -> None:
    (tmp_path / "data").mkdir()
    path = plant(tmp_path / "data", tree) if kind == "folder" else pack(tmp_path / "d.tar", tree)
    assert "expected LABEL/PHOTO" in refusal(read_labelled, path)


CAPTIONED = {
    "photos/b.jpg": b"1",
    "photos/a.jpg": b"2",
    "photos/unlisted.jpg": b"3",
    "photos/captions.jsonl": (
        '{"file": "a.jpg", "captions": ["a man runs", "someone is running"]}\n'
        '{"file": "b.jpg", "captions": ["one\u2028line, two\u0085lines"]}\n'
        "\n"
        '{"file": "absent.jpg", "captions": ["nothing"]}\n'
    ).encode(),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_captioned_photos(tmp_path: Path, kind: str) -> None:
    path = plant(tmp_path, CAPTIONED) / "photos" if kind == "folder" else pack(tmp_path / "c.tar", CAPTIONED)
    assert read_captioned(path) == [
        Photo("photos/a.jpg", b"2", captions=("a man runs", "someone is running")),
        Photo("photos/b.jpg", b"1", captions=("one\u2028line, two\u0085lines",)),
    ]


@pytest.mark.parametrize("prefix", ["", "./", "set/"])
def test_captioned_photos_of_one_name_in_two_folders(tmp_path: Path, prefix: str) -> None:
    listing = "".join(json.dumps({"file": f"{one}/1.jpg", "captions": [one]}) + "\n" for one in "ab").encode()
    tree = {"captions.jsonl": listing, "a/1.jpg": b"a", "b/1.jpg": b"b"}
    found = open_source(str(pack(tmp_path / "c.tar", tree, prefix))).read()
    assert [(photo.content, photo.captions) for photo in found] == [(b"a", ("a",)), (b"b", ("b",))]


def test_missing_captions_say_what_was_expected(tmp_path: Path) -> None:
    message = refusal(read_captioned, plant(tmp_path / "data", {"a.jpg": b"1"}))
    assert "no captions.jsonl" in message
    assert "'file', 'captions'" in message


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "hello",
        "[]",
        "3",
        '"a.jpg"',
        '{"file": "a.jpg"}',
        '{"captions": ["a"]}',
        '{"file": "a.jpg", "captions": null}',
        '{"file": "a.jpg", "captions": "a man runs"}',
        '{"file": "a.jpg", "captions": [1, 2]}',
        '{"file": ["a.jpg"], "captions": ["a"]}',
        "\udcff",
    ],
    ids=str,
)
def test_a_malformed_caption_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    good = json.dumps({"file": "a.jpg", "captions": ["fine"]})
    listing = f"{good}\n{line}\n".encode("utf-8", "surrogateescape")
    path = plant(tmp_path / "data", {"a.jpg": b"1", "captions.jsonl": listing})
    message = refusal(read_captioned, path)
    assert "captions.jsonl" in message
    assert "line 2" in message


def test_captions_without_any_of_their_photos_are_refused(tmp_path: Path) -> None:
    listing = b'{"file": "a.jpg", "captions": ["fine"]}\n'
    assert "no photos" in refusal(read_captioned, plant(tmp_path / "data", {"captions.jsonl": listing}))


def test_labelled_files_are_listed_without_being_opened(tmp_path: Path) -> None:
    root = plant(tmp_path / "data", TREE | {"stray.jpg": b"6", "sit/deeper/c.jpg": b"7"})
    (root / "sit" / "folder.jpg").mkdir()
    assert list_labelled(root) == [(root / name, label) for name, label in LABELLED]


@pytest.mark.parametrize("tree", [{}, {"a.jpg": b"1"}, {"sit/notes.txt": b"x"}], ids=["empty", "flat", "no photos"])
def test_a_listing_without_photos_says_what_was_expected(tmp_path: Path, tree: dict[str, bytes]) -> None:
    (tmp_path / "data").mkdir()
    assert "expected data/LABEL/PHOTO" in refusal(list_labelled, plant(tmp_path / "data", tree))


def test_only_a_folder_can_be_listed(tmp_path: Path) -> None:
    assert "not a folder" in refusal(list_labelled, tmp_path / "absent")
    assert "not a folder" in refusal(list_labelled, pack(tmp_path / "d.tar", TREE))
