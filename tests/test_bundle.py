from __future__ import annotations

import errno
import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save

from cliphar.bundle import (
    BUNDLE_JSON,
    SCHEMA_VERSION,
    Bundle,
    BundleInfo,
    Calibration,
    FileInfo,
    ImageSpec,
    Metrics,
    Provenance,
    Source,
    TextSpec,
    read_bundle,
    sha256_file,
    write_bundle,
)
from cliphar.errors import BundleError, ClipharError

LABELS = ("riding a bike", "cooking", "reading")
DIM = 4
HEAD = "head.safetensors"


def make_info(**changes: Any) -> BundleInfo:
    calibration = Calibration(logit_scale=80.0, conformal=((0.9, 0.7), (0.95, 0.8)), unknown_below=0.1, photos=500)
    fields: dict[str, Any] = {
        "name": "tiny",
        "description": "made by a test",
        "labels": LABELS,
        "embedding_dim": DIM,
        "image": ImageSpec(size=32, max_aspect=1.25),
        "text": TextSpec(templates=("a photo of a person {}.", "{}"), context_length=16),
        "known": calibration,
        "open": calibration,
        "metrics": {"test": Metrics(description="held-out photos", n=10, values={"top1": 0.5})},
        "sources": (Source(name="CLIP", role="teacher", licence="MIT"),),
        "limits": ("one person at a time",),
        "provenance": Provenance(
            recipe={"seed": 7, "nested": {"steps": [1, 2.5]}},
            data_sha256="00",
            git_revision="abc",
            seed=7,
            versions={"numpy": "2"},
            hardware="cpu",
            created="2026-11-24T00:00:00Z",
        ),
    }
    return BundleInfo.model_validate(fields | changes)


def vectors(rows: int = len(LABELS), columns: int = DIM) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def make_files(**more: Path | bytes) -> dict[str, Path | bytes]:
    return {HEAD: save({"class_vectors": vectors()}), "image.onnx": b"image graph" * 50, "sub/plan.bin": b"plan"} | more


def make_bundle(root: Path, files: dict[str, Path | bytes] | None = None, **changes: Any) -> Path:
    write_bundle(root, make_info(**changes), make_files() if files is None else files)
    return root


def edit_json(root: Path, **changes: Any) -> None:
    manifest = root / BUNDLE_JSON
    manifest.write_text(json.dumps(json.loads(manifest.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def list_file(root: Path, name: str, content: bytes) -> None:
    """Make bundle.json promise a file, rightly but for its name."""
    files = json.loads((root / BUNDLE_JSON).read_text(encoding="utf-8"))["files"]
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_json(root, files=files | {name: entry})


def refusal(root: Path | str, **options: Any) -> str:
    """The message of read_bundle's refusal, which must be one line."""
    with pytest.raises(BundleError) as caught:
        read_bundle(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = write_bundle(str(tmp_path / "b"), make_info(), make_files())
    read = read_bundle(str(tmp_path / "b"))
    assert read == written
    assert read.info.model_copy(update={"files": {}}) == make_info()
    assert sorted(read.info.files) == [HEAD, "image.onnx", "sub/plan.bin"]
    assert read.file("sub/plan.bin").read_bytes() == b"plan"


def test_parents_of_the_target_are_made(tmp_path: Path) -> None:
    assert read_bundle(make_bundle(tmp_path / "x" / "y" / "b")).info.labels == LABELS


def test_digests_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "b"))
    for name, entry in bundle.info.files.items():
        digest = hashlib.sha256(bundle.file(name).read_bytes()).hexdigest()
        assert entry.sha256 == digest == sha256_file(bundle.path / name)
        assert entry.bytes == (bundle.path / name).stat().st_size


def test_files_come_from_paths_too(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"from a file")
    bundle = write_bundle(tmp_path / "b", make_info(), {"image.onnx": source})
    assert bundle.file("image.onnx").read_bytes() == b"from a file"
    assert source.exists()


def test_runtime_and_parity_survive_writing(tmp_path: Path) -> None:
    stale = FileInfo(sha256="0" * 64, bytes=1, runtime="onnx", parity={"cosine": 0.999})
    bundle = write_bundle(tmp_path / "b", make_info(files={"image.onnx": stale, "gone.onnx": stale}), make_files())
    assert bundle.info.files["image.onnx"].runtime == "onnx"
    assert bundle.info.files["image.onnx"].parity == {"cosine": 0.999}
    assert bundle.info.files["image.onnx"].bytes == 550
    assert "gone.onnx" not in bundle.info.files


def test_labels_outside_ascii_are_kept(tmp_path: Path) -> None:
    labels = ("Fahrrad fahren", "自転車に乗る", "naïve ‘quote’ 🚲")
    assert read_bundle(make_bundle(tmp_path / "b", labels=labels)).info.labels == labels


def test_a_written_bundle_can_be_entered_by_others(tmp_path: Path) -> None:
    assert make_bundle(tmp_path / "b").stat().st_mode & 0o777 == 0o755


def test_a_bundle_that_was_moved_or_is_behind_a_link_reads(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b").rename(tmp_path / "elsewhere")
    assert read_bundle(tmp_path / "elsewhere").path == tmp_path / "elsewhere"
    (tmp_path / "latest").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert read_bundle(tmp_path / "latest").info.name == "tiny"


def test_a_link_that_stays_inside_reads(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "image.onnx").rename(root / "sub" / "image.onnx")
    (root / "image.onnx").symlink_to("sub/image.onnx")
    assert read_bundle(root).file("image.onnx").read_bytes() == b"image graph" * 50


@pytest.mark.parametrize("place", ["absent", "empty", "a file", "below a file"])
def test_no_bundle_there_says_where_to_look(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_bytes(b"x")
    root = tmp_path / ("a file/b" if place == "below a file" else place)
    message = refusal(root)
    assert str(root) in message
    assert BUNDLE_JSON in message
    assert "cliphar model list" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"name": "tiny"',
        b"hello",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "brace", "cut", "text", "not utf-8", "nested too deep", "number too long"],
)
def test_invalid_json_is_refused(tmp_path: Path, content: bytes) -> None:
    root = make_bundle(tmp_path / "b")
    (root / BUNDLE_JSON).write_bytes(content)
    message = refusal(root)
    assert message.startswith(f"cannot read {root / BUNDLE_JSON}: ")
    assert message.endswith("copy or make the bundle again")


@pytest.mark.parametrize("reader", ["pathlib.Path.read_bytes", "cliphar.bundle._io.sha256_file"])
def test_a_bundle_that_may_not_be_read_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    root = make_bundle(tmp_path / "b")
    monkeypatch.setattr(reader, refused)
    assert refusal(root).endswith(f"let this user read it: chmod -R a+rX {root}")


def test_a_folder_named_bundle_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / BUNDLE_JSON).mkdir()
    assert "cannot read" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"tiny"'])
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    root = make_bundle(tmp_path / "b")
    (root / BUNDLE_JSON).write_text(content, encoding="utf-8")
    assert "is not valid" in refusal(root)


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    edit_json(root, surprise=1)
    message = refusal(root)
    assert "surprise" in message


def test_an_unknown_nested_key_is_refused_with_its_place(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    edit_json(root, image={"size": 32, "mean": 0.5})
    assert "image.mean" in refusal(root)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    fields = json.loads((root / BUNDLE_JSON).read_text(encoding="utf-8"))
    del fields["provenance"]
    (root / BUNDLE_JSON).write_text(json.dumps(fields), encoding="utf-8")
    assert "provenance" in refusal(root)


def test_a_newer_schema_asks_for_an_upgrade_even_if_it_has_new_keys(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    edit_json(root, schema_version=SCHEMA_VERSION + 1, surprise=1)
    message = refusal(root)
    assert f"schema {SCHEMA_VERSION + 1}" in message
    assert "upgrade cliphar" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ["a", "b", "a"]},
        {"name": ""},
        {"name": "../tiny"},
        {"name": ".hidden"},
        {"name": "n" * 65},
        {"embedding_dim": 0},
        {"embedding_dim": "many"},
        {"image": {"size": 8}},
        {"image": {"size": 224, "max_aspect": 0.5}},
        {"text": {"templates": [], "context_length": 16}},
        {"text": {"templates": ["a photo"], "context_length": 16}},
        {"text": {"templates": ["{} and {}"], "context_length": 16}},
        {"text": {"templates": ["a {label}"], "context_length": 16}},
        {"text": {"templates": ["fine {}", "not fine"], "context_length": 16}},
        {"text": {"templates": ["{}"], "context_length": 1}},
        {"known": {"logit_scale": 0, "conformal": [[0.9, 0.5]], "unknown_below": 0, "photos": 1}},
        {"known": {"logit_scale": 1, "conformal": [], "unknown_below": 0, "photos": 1}},
        {"known": {"logit_scale": 1, "conformal": [[0.9, 0.5], [0.8, 0.6]], "unknown_below": 0, "photos": 1}},
        {"known": {"logit_scale": 1, "conformal": [[0.8, 0.6], [0.9, 0.5]], "unknown_below": 0, "photos": 1}},
        {"known": {"logit_scale": 1, "conformal": [[0.9, 0.5], [0.9, 0.6]], "unknown_below": 0, "photos": 1}},
        {"known": {"logit_scale": 1, "conformal": [[0.9, 0.5]], "unknown_below": 2, "photos": 1}},
        {"files": {"image.onnx": {"sha256": "abc", "bytes": 1}}},
        {"files": {"image.onnx": {"sha256": "0" * 64, "bytes": -1}}},
    ],
    ids=str,
)
def test_impossible_values_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    root = make_bundle(tmp_path / "b")
    edit_json(root, **changes)
    message = refusal(root)
    assert f"{root / BUNDLE_JSON} is not valid: " in message
    assert "make the bundle again" in message


def test_repeated_labels_and_a_bad_template_are_named() -> None:
    with pytest.raises(ValidationError, match="labels repeat"):
        make_info(labels=("a", "b", "a"))
    with pytest.raises(ValidationError, match="a photo of nothing"):
        TextSpec(templates=("a photo of nothing",), context_length=8)


def test_info_is_frozen() -> None:
    with pytest.raises(ValidationError):
        make_info().name = "other"


@pytest.mark.parametrize(
    "name",
    ["../x", "..", "sub/../../x", "/etc/passwd", "sub\\x", "..\\x", "C:x", "c:/x", "\\\\host\\x", ""],
)
def test_a_listed_path_that_leaves_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    root = make_bundle(tmp_path / "b")
    (tmp_path / "x").write_bytes(b"outside")
    list_file(root, name, b"outside")
    message = refusal(root)
    assert repr(name) in message
    assert "leaves the bundle" in message


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", ".", "sub"], ids=["too long", "nul", "dot", "folder"])
def test_a_listed_path_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    root = make_bundle(tmp_path / "b")
    list_file(root, name, b"x")
    assert "copy or pull the bundle again" in refusal(root)


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_that_leaves_the_bundle_is_refused(tmp_path: Path, relative: bool) -> None:
    root = make_bundle(tmp_path / "b")
    outside = tmp_path / "outside.onnx"
    (root / "image.onnx").rename(outside)
    (root / "image.onnx").symlink_to("../outside.onnx" if relative else outside)
    message = refusal(root)
    assert "image.onnx" in message
    assert "link that leaves it" in message


def test_a_linked_folder_that_leaves_the_bundle_is_refused(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "sub").rename(tmp_path / "moved")
    (root / "sub").symlink_to(tmp_path / "moved", target_is_directory=True)
    assert "link that leaves it" in refusal(root, verify=False)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "image.onnx").unlink()
    (root / "image.onnx").symlink_to("image.onnx")
    assert "image.onnx" in refusal(root)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(tmp_path: Path, verify: bool) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "sub" / "plan.bin").unlink()
    message = refusal(root, verify=verify)
    assert "lacks sub/plan.bin" in message


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("content", "said"), [(b"", "cut short"), (b"pla", "cut short"), (b"plans", "longer")])
def test_a_file_of_another_size_is_refused(tmp_path: Path, verify: bool, content: bytes, said: str) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "sub" / "plan.bin").write_bytes(content)
    message = refusal(root, verify=verify)
    assert said in message
    assert f"{len(content)} of 4 bytes" in message


@pytest.mark.parametrize("position", [0, 275, 549])
def test_one_altered_byte_is_found(tmp_path: Path, position: int) -> None:
    root = make_bundle(tmp_path / "b")
    content = bytearray((root / "image.onnx").read_bytes())
    content[position] ^= 1
    (root / "image.onnx").write_bytes(content)
    message = refusal(root)
    assert "image.onnx" in message
    assert "altered" in message
    assert isinstance(read_bundle(root, verify=False), Bundle)


def test_an_unlisted_file_is_no_part_of_the_bundle(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "notes.txt").write_bytes(b"mine")
    with pytest.raises(BundleError, match=r"has no notes\.txt: it holds head\.safetensors, image\.onnx, sub/plan\.bin"):
        read_bundle(root).file("notes.txt")


def test_class_vectors_come_in_the_order_of_the_labels(tmp_path: Path) -> None:
    found = read_bundle(make_bundle(tmp_path / "b")).class_vectors()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors())


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    for use in (read_bundle, make_bundle):
        with pytest.raises(BundleError, match=r"b\\udcff: the name is no UTF-8"):
            use(tmp_path / "b\udcff")


def raw_safetensors(dtype: str, bytes_each: int) -> bytes:
    size = len(LABELS) * DIM * bytes_each
    entry = {"dtype": dtype, "shape": [len(LABELS), DIM], "data_offsets": [0, size]}
    header = json.dumps({"class_vectors": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


WHOLE_HEAD = save({"class_vectors": vectors()})


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (save({"class_vectors": vectors(rows=2)}), "(2, 4)"),
        (save({"class_vectors": vectors(columns=5)}), "(3, 5)"),
        (save({"class_vectors": vectors().ravel()}), "(12,)"),
        (save({"class_vectors": vectors().astype(np.float64)}), "float64"),
        (save({"class_vectors": vectors().astype(np.float16)}), "float16"),
        (save({"other": vectors()}), "class_vectors"),
        (raw_safetensors("BF16", 2), HEAD),
        (raw_safetensors("F8_E4M3", 1), HEAD),
        (WHOLE_HEAD[:-1], HEAD),
        (WHOLE_HEAD[:20], HEAD),
        (b"\xff" * 8 + WHOLE_HEAD[8:], HEAD),
        (b"not safetensors at all", HEAD),
        (b"", HEAD),
    ],
    ids=["rows", "columns", "flat", "f64", "f16", "key", "bf16", "f8", "cut", "cut header", "length", "text", "empty"],
)
def test_wrong_class_vectors_are_refused_though_their_digest_is_right(tmp_path: Path, head: bytes, said: str) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "b", files={HEAD: head}))
    with pytest.raises(BundleError) as caught:
        bundle.class_vectors()
    message = str(caught.value)
    assert said in message
    assert "make the bundle again" in message
    assert "\n" not in message


def test_class_vectors_without_a_head_are_refused(tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "b", files={"image.onnx": b"x"}))
    with pytest.raises(BundleError, match=r"has no head\.safetensors"):
        bundle.class_vectors()


def test_overwriting_is_refused_unless_asked_for(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    before = snapshot(tmp_path)
    with pytest.raises(BundleError, match="exists; choose another place or ask to overwrite it"):
        write_bundle(root, make_info(name="other"), make_files())
    assert snapshot(tmp_path) == before


def test_overwriting_replaces_the_whole_bundle_and_nothing_of_others(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_bytes(b"left by someone")
    (root / "data").symlink_to(tmp_path)
    (root / "image.fp16.onnx").mkdir()
    (root / "image.fp16.onnx" / "in the way").touch()
    bundle = write_bundle(root, make_info(name="other"), {"image.onnx": b"new", "image.fp16.onnx": b""}, overwrite=True)
    assert bundle == read_bundle(root)
    (root / "data").unlink()
    kept = {f"b/{name}" for name in (BUNDLE_JSON, "image.fp16.onnx", "image.onnx", "mine/notes.txt")}
    assert snapshot(tmp_path).keys() == kept
    assert (root / "mine" / "notes.txt").read_bytes() == b"left by someone"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_overwriting_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (make_bundle(tmp_path / "b") / "notes.txt").touch()
    before = snapshot(tmp_path / "b")
    (tmp_path / "latest").symlink_to(tmp_path / "b", target_is_directory=True)
    write_bundle(tmp_path / "latest", make_info(name="other"), make_files(), overwrite=True)
    assert read_bundle(tmp_path / "latest").info.name == "other"
    assert snapshot(tmp_path / "b") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "latest"]


def test_a_bundle_can_be_rewritten_from_its_own_files(tmp_path: Path) -> None:
    old = read_bundle(make_bundle(tmp_path / "b"))
    sources: dict[str, Path | bytes] = {name: old.file(name) for name in old.info.files}
    new = write_bundle(old.path, old.info, sources | {"image.int8.onnx": b"small"}, overwrite=True)
    assert sorted(new.info.files) == [HEAD, "image.int8.onnx", "image.onnx", "sub/plan.bin"]
    np.testing.assert_array_equal(new.class_vectors(), vectors())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    holiday = tmp_path / "photos"
    holiday.mkdir()
    (holiday / "holiday.jpg").write_bytes(b"precious")
    before = snapshot(tmp_path)
    with pytest.raises(BundleError, match="choose another place"):
        write_bundle(holiday, make_info(), make_files(), overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "b").write_bytes(b"precious")
    with pytest.raises(BundleError, match="choose another place"):
        write_bundle(tmp_path / "b", make_info(), make_files(), overwrite=overwrite)
    assert snapshot(tmp_path) == {"b": b"precious"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_bundle(tmp_path / "b", make_info(), make_files(), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_missing_source_leaves_everything_as_it_was(tmp_path: Path, there_before: bool) -> None:
    root = make_bundle(tmp_path / "b") if there_before else tmp_path / "b"
    before = snapshot(tmp_path)
    with pytest.raises((OSError, ClipharError), match=r"absent\.onnx"):
        write_bundle(root, make_info(), make_files() | {"z.onnx": tmp_path / "absent.onnx"}, overwrite=True)
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["b"] if there_before else [])


@pytest.mark.parametrize("name", ["../evil", "../../evil", "sub/../../evil", "sub\\evil", "", "c:evil", "/evil"])
def test_writing_a_path_that_leaves_the_bundle_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    root = make_bundle(tmp_path / "store" / "b")
    before = snapshot(tmp_path)
    with pytest.raises(BundleError, match="leaves the bundle"):
        write_bundle(root, make_info(), make_files() | {name: b"evil"}, overwrite=True)
    assert snapshot(tmp_path) == before
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["b"]


def test_a_file_cannot_take_the_place_of_bundle_json(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    before = snapshot(tmp_path)
    with pytest.raises(BundleError):
        write_bundle(root, make_info(), make_files() | {BUNDLE_JSON: b"{}"}, overwrite=True)
    assert snapshot(tmp_path) == before


def test_what_cannot_be_read_back_is_not_put_in_place(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    before = snapshot(tmp_path)
    broken = make_info(metrics={"test": Metrics(description="", n=0, values={"top1": float("nan")})})
    with pytest.raises(BundleError, match=r"metrics\.test\.values\.top1"):
        write_bundle(root, broken, make_files(), overwrite=True)
    assert snapshot(tmp_path) == before


def test_what_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = snapshot(make_bundle(tmp_path / "b")), Path.rename
    ends = [OSError(errno.EBUSY, "busy"), KeyboardInterrupt("now")]

    def end(self: Path, target: Path) -> Path:
        if self.parent == target.parent:
            raise ends.pop()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", end)
    for kind, said in ((KeyboardInterrupt, "now"), (BundleError, "is mounted")):
        with pytest.raises(kind, match=said):
            write_bundle(tmp_path / "b", make_info(), {}, overwrite=True)
        assert snapshot(tmp_path / "b") == before
        assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_folders_of_other_writers_are_left_alone(tmp_path: Path) -> None:
    for name in (".b.abcdefgh", ".b.old.abcdefgh", ".b.", "b.old", ".b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work").write_bytes(name.encode())
    before = snapshot(tmp_path)
    write_bundle(make_bundle(tmp_path / "b"), make_info(), make_files(), overwrite=True)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in after if not name.startswith("b/")} == before


def complaints_of(writers: int, root: Path, **how: bool) -> list[str]:
    """What each of many at once is told, or nothing."""

    def write(number: int) -> str:
        try:
            write_bundle(root, make_info(name=f"writer-{number}"), {"image.onnx": b"%d" % number}, **how)
        except BundleError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(write, range(writers)))


def test_of_many_writers_that_may_not_overwrite_one_wins(tmp_path: Path) -> None:
    complaints = complaints_of(16, tmp_path / "b")
    assert complaints.count("") == 1
    assert read_bundle(tmp_path / "b").info.name == f"writer-{complaints.index('')}"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_many_writers_at_once_leave_one_whole_bundle_and_no_litter(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "b")
    complaints = complaints_of(32, root, overwrite=True)
    bundle = read_bundle(root)
    number = int(bundle.info.name.removeprefix("writer-"))
    assert bundle.file("image.onnx").read_bytes() == b"%d" % number
    assert complaints[number] == ""
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
