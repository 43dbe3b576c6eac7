"""Every kind of data set behind one function: photos or clips come one by one, with what is known of them.

| source | what it is |
|---|---|
| a folder, or a tar or zip of it | LABEL/FILE or SPLIT/LABEL/FILE, SPLIT being train, val (validation, valid) or test |
| a folder, or a tar of it | with a captions.jsonl of {"file", "captions"} |
| .csv, .jsonl, .parquet | a manifest: ``file``, and ``label``, ``captions`` (or ``caption``), ``split`` if there are any |
| a .tar of samples, a folder of such, or a pattern with {000..009} | WebDataset shards: KEY.jpg with KEY.cls, KEY.txt or KEY.json |
| hub:OWNER/NAME or hub:OWNER/NAME@PART, or a folder that ``datasets`` saved | a data set of the hub; one part of it |

WebDataset: https://github.com/webdataset/webdataset. Clips are files with a video's suffix, in any of them.
"""  # noqa: E501

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path, PurePosixPath
from typing import Any

from cliphar.data._sources import Photo, is_file, open_tar, read_captioned, read_file, tar_files
from cliphar.errors import DataError, UsageError, reason_of
from cliphar.labels import clean_label
from cliphar.media import files_in, is_hidden, is_media

__all__ = ["SPLITS", "PhotoSource", "open_source"]

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
_SPLIT_NAMES |= {"test": "test", "testing": "test"}
_TEXTS = frozenset({"cls", "txt", "json"})


@dataclass(frozen=True)
class PhotoSource:
    """A data set that can be read again and again.

    ``fingerprint`` changes when a file of it changes (sizes and times, not contents); ``read`` gives its photos, each
    with its content, in an order that does not change. ``note`` says what is left out.
    """

    name: str
    kind: str
    fingerprint: str
    read: Callable[[], Iterator[Photo]]
    note: str = ""


def open_source(source: str) -> PhotoSource:  # noqa: PLR0911 - one for each kind
    """Find out what kind of data set ``source`` is; nothing but names is read.

    Raises:
        DataError: it does not exist or is of no known kind.
        UsageError: reading it needs a package that is not installed.
    """
    if source.startswith("hub:"):
        return _hub(source.removeprefix("hub:"), source)
    path = Path(source)
    if re.search(r"\{\d+\.\.\d+\}", source):
        return _shards(_expand_braces(source), source)
    if path.is_dir() and source:
        if (path / "captions.jsonl").is_file():
            return _manifest(path / "captions.jsonl", source)
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _hub(str(path), source)
        tars = sorted(path.glob("*.tar"))
        if tars and not any(inside.is_dir() and not is_hidden(inside.name) for inside in path.iterdir()):
            return _shards(tars, source)
        return _folder(path, source)
    if not path.is_file():
        raise DataError(f"no data at {source}: there is no such file or folder; check the path")
    if path.suffix.lower() in (".csv", ".jsonl", ".parquet"):
        return _manifest(path, source)
    if tarfile.is_tarfile(path):
        return _shards([path], source) if _has_samples(path) else _tar(path, source)
    if zipfile.is_zipfile(path):
        return _zip(path, source)
    raise DataError(f"{source} is no data set: give a folder, a tar, a zip, or a .csv, .jsonl or .parquet manifest")


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        # a name may be no UTF-8
        digest.update(f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _labelled(name: str, content: bytes) -> Photo | None:
    """A photo at .../SPLIT/LABEL/FILE or .../LABEL/FILE."""
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or not is_media(name):
        return None
    split = _SPLIT_NAMES.get(parts[-3].lower()) if len(parts) > 2 else None
    return Photo(name, content, label=clean_label(parts[-2]) or None, split=split)


def _folder(path: Path, source: str) -> PhotoSource:
    files = [file for file in files_in(path) if is_media(file.name) or not file.is_file()]
    closed = [file for file in files if not os.access(file, os.R_OK)]
    if closed:
        raise DataError(
            f"{len(closed)} of the {len(files)} files in {path} cannot be opened, such as {closed[0]}; "
            "see what it links to and who may read it, or remove it"
        )
    beside = [file for file in files if file.parent == path]
    if len(beside) == len(files):
        raise DataError(f"no photos in the subfolders of {path}; expected {path.name}/LABEL/PHOTO")

    def read() -> Iterator[Photo]:
        for file in files:
            photo = _labelled(file.relative_to(path).as_posix(), read_file(file))
            if photo is not None:
                yield replace(photo, key=f"{path.name}/{photo.key}")

    note = f"left out {len(beside)} files beside the label folders, such as {beside[0]}" if beside else ""
    return PhotoSource(source, "folder", _fingerprint(files), read, note)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_tar(path) as tar:
        for member in tar:
            handle = tar.extractfile(member) if is_file(member) and not is_hidden(member.name) else None
            if handle is not None:
                yield member.name, handle.read()


def _has_samples(path: Path) -> bool:
    """Whether a tar holds KEY.cls, KEY.txt or KEY.json beside KEY.jpg among its first files."""
    with open_tar(path, whole=False) as tar:
        names = [member.name for _, member in zip(range(16), tar, strict=False) if member.isfile()]
    texts = {name.rpartition(".")[0] for name in names if PurePosixPath(name).suffix[1:].lower() in _TEXTS}
    return any(is_media(name) and name.rpartition(".")[0] in texts for name in names)


def _tar(path: Path, source: str) -> PhotoSource:
    with open_tar(path) as tar:
        if any(PurePosixPath(name).name == "captions.jsonl" for name in tar.getnames()):
            return PhotoSource(source, "captioned", _fingerprint([path]), lambda: iter(read_captioned(path)))

    def read() -> Iterator[Photo]:
        return filter(None, starmap(_labelled, tar_files(path, is_media)))

    return PhotoSource(source, "tar", _fingerprint([path]), read)


def _zip(path: Path, source: str) -> PhotoSource:
    def read() -> Iterator[Photo]:
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.replace("\\", "/"): name for name in archive.namelist()}  # Windows PowerShell's are \
                keys = sorted(filter(is_media, names), key=PurePosixPath)
                yield from filter(None, (_labelled(key, archive.read(names[key])) for key in keys))
        # RuntimeError: a password is asked for; NotImplementedError: an unusual compression
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}; make the zip file again") from error

    return PhotoSource(source, "zip", _fingerprint([path]), read)


def _expand_braces(pattern: str) -> list[Path]:
    if not (found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [Path(pattern)]
    first, last = found.groups()
    return [
        path
        for number in range(int(first), int(last) + 1)
        for path in _expand_braces(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")
    ]


def _shards(paths: list[Path], source: str) -> PhotoSource:
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"no shard {absent[0]} (of {len(paths)}); check the pattern {source}")

    def read() -> Iterator[Photo]:
        for path in paths:
            key, fields = "", dict[str, bytes]()
            for name, content in _members(path):
                pure = PurePosixPath(name)
                stem, _, suffix = pure.name.partition(".")
                base = (pure.parent / stem).as_posix()
                if base != key:
                    yield from _sample(key, fields, path)
                    key, fields = base, {}
                fields[suffix.lower()] = content
            yield from _sample(key, fields, path)

    return PhotoSource(source, "shards", _fingerprint(paths), read)


def _sample(key: str, fields: dict[str, bytes], shard: Path) -> Iterator[Photo]:
    suffix = next((suffix for suffix in fields if is_media("x." + suffix)), None)
    where = f"sample {key} of {shard}"
    if suffix is None:
        if "cls" in fields:
            raise DataError(f"{where} has no photo beside its label; pack by tar --sort=name")
        return
    about: dict[str, Any] = {}
    try:
        if "json" in fields:
            about = dict(json.loads(fields["json"]))
        if "cls" in fields:
            about["label"] = fields["cls"].decode("utf-8-sig").strip()
        if "txt" in fields:
            about["captions"] = [line for line in fields["txt"].decode("utf-8-sig").splitlines() if line.strip()]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is malformed: {error}") from error
    yield _from_row(about, f"{shard.name}/{key}.{suffix}", fields[suffix], where)


def _from_row(row: dict[str, Any], key: str, content: bytes, where: str) -> Photo:
    label, captions = row.get("label"), row.get("captions", row.get("caption")) or ()
    if isinstance(captions, str):
        captions = (captions,)
    if isinstance(label, list | dict | bytes):
        raise DataError(f"{where}: its label is {type(label).__name__}, not a text or a number")
    if not isinstance(captions, list | tuple) or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{where}: its captions are not texts")
    split = str(row.get("split") or "").strip().lower()
    if split and split not in _SPLIT_NAMES:
        raise DataError(f"{where}: split {split!r} is none of train, val and test")
    return Photo(
        key,
        content,
        label=None if label is None or label != label else clean_label(str(label)) or None,  # noqa: PLR0124, NaN
        captions=tuple(text for text in captions if text.strip()),
        split=_SPLIT_NAMES.get(split),
    )


def _manifest(path: Path, source: str) -> PhotoSource:
    rows = list(_rows(path))
    names = [row.get("file") or row.get("path") or row.get("file_name") for row in rows]
    lacking = next((at for at, name in enumerate(names) if not name), None)
    columns = ", ".join(map(str, rows[lacking or 0])) if rows else "nothing"
    expected = f"expected columns file, label, captions, split, and found {columns[:200]}"
    if not rows or lacking is not None:
        where = path if lacking is None else f"row {lacking + 1} of {path}"
        raise DataError(f"{where} names no file; {expected}")
    for name, row in zip(names, rows, strict=True):
        if any(row.get("\0", ())):  # else a label is cut
            raise DataError(f"{path}: the row of {name} has more cells than the header; quote what holds commas")
    if not any(row.get(key) not in (None, "") for row in rows for key in ("label", "captions", "caption")):
        raise DataError(f"{path} has neither labels nor captions; {expected}")
    files = [path.parent / str(name) for name in names]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise DataError(f"{len(absent)} of the {len(files)} files in {path} do not exist, such as {absent[0]}")

    def read() -> Iterator[Photo]:
        for number, (row, name, file) in enumerate(zip(rows, names, files, strict=True), 1):
            yield _from_row(row, str(name), read_file(file), f"row {number} of {path}")

    return PhotoSource(source, "manifest", _fingerprint([path, *files]), read)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise UsageError("Parquet needs pyarrow; run: pip install 'cliphar[parquet]'") from error
        try:
            yield from parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        return
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: it is not UTF-8 text; a spreadsheet saves it as 'CSV UTF-8'") from error
    if path.suffix.lower() == ".csv":
        between = max(",;\t", key=text.partition("\n")[0].count)  # a spreadsheet's depends on the country
        try:
            table = csv.DictReader(io.StringIO(text, None), delimiter=between, restkey="\0")
            yield from (row for row in table if any(row.values()))  # a spreadsheet's last may be empty
        except csv.Error as error:  # such as a quotation mark that nothing closes
            raise DataError(f"cannot read {path}: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {path} is not an object")
            yield row


def _hub(name: str, source: str) -> PhotoSource:
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise UsageError("a data set of the hub needs 'datasets'; run: pip install 'cliphar[hub]'") from error
    try:
        name, _, part = name.partition("@")
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
        if part:
            found = found[part]
    except Exception as error:  # the hub's client raises classes of its own
        reason = reason_of(error)
        raise DataError(f"cannot load {source}: {reason}; connect to the network or give a local copy") from error
    parts = dict(found) if isinstance(found, dict) else {None: found}
    image = {part: _column(data, source) for part, data in parts.items()}

    def read() -> Iterator[Photo]:
        for part, data in parts.items():
            names = getattr(data.features.get("label", data.features.get("labels")), "names", None)
            plain = data.cast_column(image[part], datasets.Image(decode=False))
            for number, row in enumerate(plain):
                cell, label = row[image[part]], row.get("label", row.get("labels"))
                # a row may lack its photo
                content = b"" if cell is None else cell["bytes"] or read_file(Path(cell["path"]))
                if names and label is not None:  # -1 is none
                    label = names[label] if label >= 0 else None
                about = row | {"label": label}
                about["split"] = part if len(parts) > 1 else row.get("split")
                # a name with a suffix, so that a copy of it is known for a photo
                suffix = {b"\x89PNG": "png", b"RIFF": "webp"}.get(content[:4], "jpg")
                yield _from_row(about, f"{part or 'all'}/{number}.{suffix}", content, f"row {number} of {source}")

    prints = "".join(str(data._fingerprint) for data in parts.values())
    return PhotoSource(source, "hub", hashlib.sha256(prints.encode()).hexdigest(), read)


def _column(data: Any, source: str) -> str:
    for name in ("image", "img", "photo"):
        if name in data.features:
            return name
    raise DataError(f"{source} has no column image; it has {', '.join(data.features)}")
