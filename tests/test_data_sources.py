"""Every kind of data set, the decoded cache, and what is found wrong."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cliphar.bundle import find_bundle
from cliphar.data import (
    PhotoSet,
    assign_parts,
    check_photos,
    copy_parts,
    doubtful_labels,
    list_labelled,
    load_photos,
    open_source,
    photo_stats,
)
from cliphar.data._readers import _sample
from cliphar.errors import DataError

LABELS = ("riding_a bike", "sleeping")


def scene(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)


def jpeg(seed: int, quality: int = 90) -> bytes:
    file = io.BytesIO()
    scene(seed).save(file, "JPEG", quality=quality)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos of each of two labels."""
    root = tmp_path / "set"
    for k, label in enumerate(LABELS):
        (root / label).mkdir(parents=True)
        for i in range(3):
            (root / label / f"{i}.jpg").write_bytes(jpeg(10 * k + i))
    return root


def as_tar(folder: Path) -> str:
    with tarfile.open(folder.parent / "set.tar", "w") as tar:
        for file in sorted(folder.rglob("*.jpg"))[::-1]:
            add(tar, file.relative_to(folder.parent).as_posix(), file.read_bytes())
    return str(tar.name)


def as_zip(folder: Path) -> str:
    with zipfile.ZipFile(folder.parent / "set.zip", "w") as archive:
        for i, file in enumerate(sorted(folder.rglob("*.jpg"))[::-1]):
            archive.write(file, "/\\"[i % 2].join(file.relative_to(folder.parent).parts))
    return str(archive.filename)


def as_manifest(suffix: str, between: str = ",") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        rows = [
            {"file": file.relative_to(folder.parent).as_posix(), "label": file.parent.name, "caption": "a photo"}
            for file in sorted(folder.rglob("*.jpg"))
        ]
        path = folder.parent / f"list{suffix}"
        if suffix.lower() == ".csv":
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, rows[0], delimiter=between)
                table.writeheader()
                table.writerows([*rows, {}])
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)

    return make


def as_shards(folder: Path) -> str:
    for k, label in enumerate(LABELS):
        with tarfile.open(folder.parent / f"shard-{k:03d}.tar", "w") as tar:
            for file in sorted((folder / label).iterdir()):
                add(tar, f"{k}{file.stem}.jpg", file.read_bytes())
                add(tar, f"{k}{file.stem}.cls", label.encode())
    return str(folder.parent / "shard-{000..001}.tar")


def as_hub(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    files = sorted(folder.rglob("*.jpg"))
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.ClassLabel(names=list(LABELS))})
    rows = {"image": [*map(str, files), None], "labels": [*(f.parent.name for f in files), None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder.parent / "saved")
    return str(folder.parent / "saved")


MAKERS = [
    str,
    as_tar,
    as_zip,
    as_manifest(".csv"),
    as_manifest(".CSV", ";"),
    as_manifest(".jsonl"),
    as_manifest(".parquet"),
    as_shards,
    as_hub,
]


def photos_of(source: str, cache: Path, **changes: Any) -> PhotoSet:
    return load_photos(open_source(source), cache, side=64, **changes)


@pytest.mark.filterwarnings("ignore")  # the hub's client brings its own
@pytest.mark.parametrize("make", MAKERS)
def test_every_source_holds_the_same_photos(folder: Path, tmp_path: Path, make: Callable[[Path], str]) -> None:
    photos = photos_of(make(folder), tmp_path / "cache")
    assert Counter(photos.labels) == {"riding a bike": 3, "sleeping": 3}
    assert len(set(photos.keys)) == 6
    assert {Path(key).suffix for key in photos.keys} == {".jpg"}
    found = {photos.labels[i]: photos.photo(i).astype(int) for i in range(6)}
    wanted = np.asarray(scene(2).resize((85, 64), Image.Resampling.BICUBIC)).astype(int)
    assert found["riding a bike"].shape == (64, 85, 3)
    assert np.abs(found["riding a bike"] - wanted).mean() < 4


def test_parts_in_folder_names_hold(tmp_path: Path) -> None:
    for name, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        for label in LABELS:
            (target := tmp_path / "parted" / name / label).mkdir(parents=True)
            (target / f"{part}.jpg").write_bytes(jpeg(5))
    photos = photos_of(str(tmp_path / "parted"), tmp_path / "cache")
    assert set(photos.splits) == {"train", "val", "test"}


def test_the_second_reading_decodes_nothing(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    said: list[str] = []
    first = photos_of(str(folder), cache, log=said.append)
    again = photos_of(str(folder), cache, log=said.append)
    assert sum(line.startswith("decoding") for line in said) == 1
    assert first.sha256 == again.sha256
    assert not again.photo(0).flags.owndata
    (folder / "sleeping/new.jpg").write_bytes(jpeg(77))
    for _ in range(2):
        assert len(photos_of(str(folder), cache)) == 7
        for file in cache.glob("*/*"):
            os.truncate(file, 9)
    assert not list(cache.glob(".*"))
    assert [one.stat().st_mode & 0o777 for one in cache.glob("photos-*")] == [0o755] * 2


def test_what_a_killed_reading_left_goes_and_what_another_writes_stays(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    photos_of(str(folder), cache)
    (made,) = cache.iterdir()
    left, used, new = (made.with_name(f".{made.name}.{name}") for name in ("left", "used", "new"))
    for work in (left, used, new):
        work.mkdir()
        os.utime(work, (0, 0) if work != new else None)
    shutil.rmtree(made)
    fd = os.open(used, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    photos_of(str(folder), cache)
    os.close(fd)
    assert sorted(cache.iterdir()) == sorted([made, used, new])


def test_troubles_are_found_and_parts_avoid_them(folder: Path, tmp_path: Path) -> None:
    (folder / "sleeping/bad.jpg").write_bytes(b"no photo")
    (folder / "sleeping/copy.jpg").write_bytes(jpeg(0, quality=60))
    (folder / "riding_a bike/twin.jpg").write_bytes(jpeg(1, quality=60))
    photos = photos_of(str(folder), tmp_path / "cache")
    report = check_photos(photos)
    assert [key for key, _ in report.refused] == ["set/sleeping/bad.jpg"]
    assert sorted(report.duplicates) == [
        ["set/riding_a bike/0.jpg", "set/sleeping/copy.jpg"],
        ["set/riding_a bike/1.jpg", "set/riding_a bike/twin.jpg"],
    ]
    assert report.conflicts == [["set/riding_a bike/0.jpg", "set/sleeping/copy.jpg"]]
    assert photo_stats(photos)["labels"] == {"riding a bike": 4, "sleeping": 4}


def test_the_command_line(folder: Path, tmp_path: Path, clean_env: dict[str, str]) -> None:
    (folder / "sleeping/bad.jpg").write_bytes(b"no photo")

    def cliphar(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cliphar", "data", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean_env, cwd=tmp_path, check=False)

    done = cliphar("check", "set", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["refused"][0]["file"] == "set/sleeping/bad.jpg"
    done = cliphar("split", "set", "--out", "parts", "--val", "0.3", "--test", "0.3")
    assert (done.returncode, "left out set/sleeping/bad.jpg" in done.stderr) == (1, True)  # from the cache too
    files = [file.relative_to(tmp_path / "parts").parts for file in (tmp_path / "parts").rglob("*.jpg")]
    assert Counter(part for part, _, _ in files) == {"train": 2, "val": 2, "test": 2}
    assert cliphar("split", "set", "--out", "parts").returncode == 2
    assert json.loads(cliphar("stats", "parts", "--json").stdout)["parts"] == {"test": 2, "train": 2, "val": 2}
    seen, said = find_bundle("mini").info.image, list[str]()
    source = open_source(str(folder))
    load_photos(source, tmp_path / "runs/cache", side=seen.size, max_aspect=seen.max_aspect, frames=1, log=said.append)
    assert [line[:8] for line in said] == ["left out"]  # training reads the same cache, near-duplicates as well
    assert "with --cache\n" in cliphar("check", "set", "--cache", "set/sleeping/bad.jpg/x").stderr  # no folder
    (folder / "_").mkdir()
    for file in sorted(folder.glob("[rs]*/[12].*")):
        file.rename(folder / "_" / file.name)
    few = cliphar("split", "set", "-o", "few").stderr
    assert "2 photos have no label, or no part" in few
    assert "val and test got no photos" in few
    absent = cliphar("check", "nowhere")
    assert absent.returncode == 1
    assert absent.stderr.count("\n") == 1


def test_clips_become_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (waving := tmp_path / "clips/waving").mkdir(parents=True)
    with av.open(str(waving / "a.wmv"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 12 * i, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (waving / "b.mp4").write_bytes(b"no clip")
    photos = photos_of(str(tmp_path / "clips"), tmp_path / "cache", frames=4)
    assert photos.frames(0).shape == (4, 64, 96, 3)
    assert np.all(np.diff(photos.frames(0).mean((1, 2, 3))) > 30)
    assert [key for key, _ in photos.refused] == ["clips/waving/b.mp4"]


def test_labels_that_look_like_a_mistake_are_told() -> None:
    assert doubtful_labels(["running", "sleeping", "2 people"]) == []
    alike, numbers = doubtful_labels(["running", "Running", "0", "17", "1.0"])
    assert alike.endswith(": Running, running")
    assert ": 0, 1.0, 17; " in numbers


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("list.csv", "label\nsleeping\n", "names no file"),
        ("list.csv", "file|label\na.jpg|sleeping\n", r"found file\|label"),
        ("list.csv", "", "found nothing"),
        ("list.csv", "file,class\na.jpg,sleeping\n", "neither labels nor captions; .* found file, class"),
        ("list.csv", "file,label\nabsent.jpg,sleeping\n", "do not exist"),
        ("list.csv", 'file,label\n"' + "x" * 150_000, "cannot read"),
        ("list.csv", "file,label\na.jpg,running, fast\n", "row of a.jpg has more cells than the header"),
        ("list.jsonl", "{", "not JSON"),
        ("list.jsonl", "[" * 100_000, "not JSON"),
        ("list.txt", "x", "no data set"),
    ],
)
def test_malformed_sources_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        open_source(str(tmp_path / name))


def test_a_sample_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.jpg", jpeg(1))
        add(tar, "1.json", b"[1]")
    with pytest.raises(DataError, match=r"sample 1 of .* is malformed"):
        list(open_source(str(tar.name)).read())
    with pytest.raises(DataError, match="no photo beside its label"):
        list(_sample("1", {"cls": b"a"}, tmp_path))


def test_what_is_no_label_and_no_caption(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = str(next(folder.rglob("*.jpg")))

    def got(name: str) -> Any:
        return [(photo.label, photo.captions) for photo in open_source(str(tmp_path / name)).read()]

    of: Any = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["run"])}
    of["caption"] = datasets.Value("string")
    rows = {"image": [one] * 2, "label": [0, -1], "caption": [" ", "it"]}
    datasets.Dataset.from_dict(rows, datasets.Features(of)).save_to_disk(tmp_path / "saved")
    assert got("saved") == [("run", ()), (None, ("it",))]
    (tmp_path / "a.jsonl").write_text(json.dumps({"file": one, "label": float("nan"), "captions": ["", "so"]}))
    assert got("a.jsonl") == [(None, ("so",))]


def test_an_archive_without_labels_is_refused(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(next(folder.rglob("*.jpg")), "1.jpg")
    with pytest.raises(DataError, match="can be read: no LABEL/PHOTO"):
        photos_of(str(tmp_path / "a.zip"), tmp_path / "cache")


def test_what_a_manifest_leaves_open(folder: Path, tmp_path: Path) -> None:
    rows = [{"file": f"set/{LABELS[i // 3]}/{i % 3}.jpg", "label": LABELS[i // 3], "captions": None} for i in range(6)]
    rows[0]["split"] = "test"  # the others train, as far as they do not calibrate
    rows[1]["label"] = "_"
    (listing := tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    photos = photos_of(str(listing), tmp_path / "cache")
    assert photos.labels[:3] == ["riding a bike", None, "riding a bike"]
    (folder / LABELS[0] / "1.jpg").write_bytes(jpeg(0))  # a copy of another, but of no label
    assert not check_photos(photos_of(str(listing), tmp_path / "cache")).conflicts
    parts = assign_parts(photos, 0.4, 0.4, 0).tolist()
    assert parts[0] == 2
    assert set(parts[1:]) == {0, 1}


def test_what_tools_and_other_systems_leave_behind(folder: Path, tmp_path: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0.jpg", "sleeping/._0.jpg"):
        (folder / name).write_bytes(b"no photo")
    (folder / "sleeping" / os.fsdecode(b"\xff.jpg")).write_bytes(jpeg(20))
    photos = photos_of(str(folder), tmp_path / "cache")
    assert not photos.refused
    assert Counter(photos.labels) == {"riding a bike": 3, "sleeping": 4}


def test_files_of_one_name_are_numbered(tmp_path: Path) -> None:
    for who in "abc":
        (place := tmp_path / "set" / who / "sleeping").mkdir(parents=True)
        (place / "1.jpg").write_bytes(jpeg(ord(who)))
    source = open_source(str(tmp_path / "set"))
    photos = load_photos(source, tmp_path / "cache", side=64)
    copy_parts(source, photos, np.array([0, 0, 0]), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out/train/sleeping").iterdir())
    assert names == ["1-1.jpg", "1-2.jpg", "1.jpg"]


@pytest.mark.parametrize("label", ["..", ".x", "lost+found", "a\0b", "\ud800", "x/y"])
def test_a_label_that_is_no_folder_for_photos_is_refused(folder: Path, tmp_path: Path, label: str) -> None:
    rows = [{"file": "sleeping/0.jpg", "label": one} for one in ("x y", label)]
    (listing := folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(listing))
    photos = load_photos(source, tmp_path / "cache", side=64)
    with pytest.raises(DataError, match="cannot be a folder's name"):
        copy_parts(source, photos, np.array([0, 1]), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_was_split_is_known_for_photos(folder: Path, tmp_path: Path) -> None:
    rows = [{"file": name, "label": "/etc/x"} for name in ("0007", ".hidden.jpg")]
    for seed, row in enumerate(rows):
        (folder / row["file"]).write_bytes(jpeg(seed))
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(folder / "all.jsonl"))
    copy_parts(source, load_photos(source, tmp_path / "cache", side=64), np.array([0, 0]), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/train/_etc_x").iterdir()) == ["0007.jpg", "hidden.jpg"]


def test_what_is_left_out_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "sleeping/a\n\x1b[31m.jpg").write_bytes(b"no photo")
    said: list[str] = []
    photos_of(str(folder), tmp_path / "cache", log=said.append)
    assert r"sleeping/a\n\x1b[31m.jpg: is not an image" in said[-1]


def test_a_folder_called_train_names_no_part(folder: Path) -> None:
    source = folder.rename(folder.parent / "train")
    photos = list(open_source(str(source)).read())
    assert {photo.split for photo in photos} == {None}
    assert {photo.label for photo in photos} == {"riding a bike", "sleeping"}


def test_a_readme_does_not_make_a_tar_a_shard(folder: Path) -> None:
    with tarfile.open(folder.parent / "set.tar", "w") as tar:
        add(tar, "set/README.txt", b"two labels")
        for file in sorted(folder.rglob("*.jpg")):
            add(tar, file.relative_to(folder.parent).as_posix(), file.read_bytes())
    found = open_source(str(tar.name))
    assert found.kind == "tar"
    assert len({photo.label for photo in found.read()}) == 2


def test_the_hubs_cache_beside_shards_is_passed_over(folder: Path) -> None:
    as_shards(folder)
    folder.rename(folder.parent / ".cache")
    assert open_source(str(folder.parent)).kind == "shards"


@pytest.mark.parametrize("make", [as_tar, as_shards])
def test_half_of_a_tar_is_not_taken_for_the_whole(folder: Path, make: Callable[[Path], str]) -> None:
    source = make(folder)
    file = min(folder.parent.glob("*.tar"))
    with tarfile.open(file) as tar:
        second = tar.getmembers()[1].offset
    content = bytearray(file.read_bytes())
    content[second : second + 64] = bytes(64)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"\.tar is damaged or cut short: .*; copy it again"):
        list(open_source(source).read())


def test_a_file_named_twice_goes_under_both_labels(folder: Path, tmp_path: Path) -> None:
    rows = [f"sleeping/{i}.jpg,{label}" for i in range(3) for label in ("sleeping", "resting")]
    (manifest := folder / "rows.csv").write_text("\n".join(["file,label", *rows]))
    source = open_source(str(manifest))
    photos = load_photos(source, tmp_path / "cache", side=32, max_aspect=1.25)
    counts = copy_parts(source, photos, np.zeros(len(photos), np.int64), tmp_path / "out")
    assert counts["train"] == 6
    assert len(list((tmp_path / "out/train/resting").iterdir())) == 3


def test_a_photo_that_goes_while_others_are_read_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"file": "set/{LABELS[0]}/0.jpg", "label": "riding"}}')
    sources = [open_source(str(place)) for place in (folder, tmp_path / "list.jsonl")]
    (folder / LABELS[0] / "0.jpg").unlink()
    for source in sources:
        with pytest.raises(DataError, match=r"0\.jpg cannot be read: No such file or directory"):
            list(source.read())


def test_labels_may_be_links_and_what_they_lead_to_must_be_there(folder: Path, tmp_path: Path) -> None:
    (linked := tmp_path / "linked").mkdir()
    for label in LABELS:
        (linked / label).symlink_to(folder / label)
    assert Counter(photo.label for photo in open_source(str(linked)).read()) == {"riding a bike": 3, "sleeping": 3}
    (folder / LABELS[0] / "gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(DataError, match=r"1 of the 7 files in .* cannot be opened, such as .*gone\.jpg; see what"):
        open_source(str(linked))
    (linked / "lost+found").mkdir(mode=0)  # a disk's own: it is nobody's label
    (folder / LABELS[0] / "gone.jpg").unlink()
    (linked / "waving").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1 of the 7 files in .* cannot be opened, such as .*waving; see what"):
        open_source(str(linked))
    with pytest.raises(DataError, match=r"waving is a link to nothing"):
        list_labelled(linked)
    (linked / "waving").unlink()
    assert len(list_labelled(linked)) == len(list(open_source(str(linked)).read())) == 6
