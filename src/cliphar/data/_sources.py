"""Photo collections: a folder, or a tar of that folder, of LABEL/PHOTO, or of photos with captions.jsonl."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cliphar.errors import DataError
from cliphar.labels import clean_label
from cliphar.media import files_in, is_hidden, is_image_name, is_media

__all__ = [
    "Photo",
    "is_file",
    "labelled_keys",
    "list_labelled",
    "open_tar",
    "read_captioned",
    "read_file",
    "read_labelled",
    "stream_labelled",
    "tar_files",
]


@dataclass(frozen=True)
class Photo:
    """An encoded photo (or clip) with what is known of it: a label (spaces, not underscores), captions, and the part
    of the data that it belongs to: ``train``, ``val`` or ``test``, or None."""

    key: str
    content: bytes
    label: str | None = None
    captions: tuple[str, ...] = ()
    split: str | None = None


@contextmanager
def open_tar(path: Path, *, whole: bool = True) -> Iterator[tarfile.TarFile]:
    """A tar file; DataError, from the block or, if ``whole``, at its end, if it is damaged or cut short."""
    try:
        with tarfile.open(path) as tar:
            yield tar
            if not whole:
                return
            for _ in tar:
                pass
            assert tar.fileobj is not None  # noqa: S101 - open
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a bad header for the end
                raise tarfile.ReadError("bad header")
    # KeyError: a link to what is not in it
    except (tarfile.TarError, EOFError, OSError, KeyError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged or cut short: {error}; copy it again") from error


def is_file(member: tarfile.TarInfo) -> bool:
    """Whether a tar holds this file's content; of a file with two names, it has the second as a hard link."""
    return member.isfile() or member.islnk()


def tar_files(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a tar's files, in the order of sorted paths, of a compressed tar in its own.

    DataError as from :func:`open_tar`.
    """
    with open_tar(path) as tar:
        members = {member.name: member for member in tar if is_file(member) and wanted(member.name)}
        names = sorted(members, key=PurePosixPath)
        if not isinstance(tar.fileobj, io.BufferedReader):  # compressed: a step back unpacks all before it again
            names.sort(key=lambda name: members[name].offset)
        for name in names:
            handle = tar.extractfile(members[name])
            if handle is not None:
                yield name, handle.read()


def read_file(file: Path) -> bytes:
    """Its bytes, or DataError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; mend it or remove it") from error


def _files(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in files_in(path):
            if wanted(name := file.relative_to(path.parent).as_posix()) or file.is_dir():  # may not be entered
                yield name, read_file(file)
    elif path.is_file() and tarfile.is_tarfile(path):
        yield from tar_files(path, wanted)
    else:
        raise DataError(f"no photos at {path}: it is neither a folder nor a tar file; check the path")


def stream_labelled(path: Path, wanted: Callable[[str], bool]) -> Iterator[Photo]:
    """Photos of a folder or tar whose files lie at LABEL/PHOTO, as :func:`tar_files` does; only those are read whose
    key is wanted."""

    def is_labelled(name: str) -> bool:
        folder = PurePosixPath(name).parent.name
        return is_image_name(name) and folder != "" and not is_hidden("/".join(name.split("/")[-2:]))

    for name, content in _files(path, lambda name: is_labelled(name) and wanted(name)):
        yield Photo(name, content, label=clean_label(PurePosixPath(name).parent.name))


def labelled_keys(path: Path) -> list[str]:
    """The keys of what :func:`read_labelled` reads, in that order."""
    keys: list[str] = []

    def note(key: str) -> bool:
        keys.append(key)
        return False

    list(stream_labelled(path, note))
    return sorted(keys, key=PurePosixPath)


def read_labelled(path: Path) -> list[Photo]:
    """Photos of a folder or tar whose files lie at LABEL/PHOTO; DataError if there are none."""
    photos = list(stream_labelled(path, lambda _: True))
    if not photos:
        raise DataError(f"no photos in {path}: expected LABEL/PHOTO files")
    return sorted(photos, key=lambda photo: PurePosixPath(photo.key))


def read_captioned(path: Path) -> list[Photo]:
    """Photos of a folder or tar with a captions.jsonl of {"file", "captions"}.

    Raises:
        DataError: no captions.jsonl, a line of it is malformed, or none of its photos is there.
    """
    files = dict(_files(path))
    listing = next((name for name in files if PurePosixPath(name).name == "captions.jsonl"), None)
    if listing is None:
        raise DataError(f"no captions.jsonl in {path}; expected one line of {{'file', 'captions'}} a photo")
    captions: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(files[listing].split(b"\n"), start=1):  # splitlines also splits within strings
        if line.strip():
            name, its = _caption_row(line, f"line {number} of captions.jsonl in {path}")
            captions[name] = its
    top = PurePosixPath(listing).parent
    photos: list[Photo] = []
    for name, content in files.items():
        pure = PurePosixPath(name)
        beside = pure.relative_to(top).as_posix() if pure.is_relative_to(top) else name
        found = captions.get(beside, captions.get(pure.name))  # by its path from there, else by its name alone
        if found is not None:
            photos.append(Photo(name, content, captions=found))
    if not photos:
        raise DataError(f"no photos in {path}: none of those that captions.jsonl names is there")
    return sorted(photos, key=lambda photo: PurePosixPath(photo.key))


def _caption_row(line: bytes, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    match row:
        case {"file": str(name), "captions": [*captions]} if all(isinstance(text, str) for text in captions):
            return name, tuple(captions)
    raise DataError(f"{where} is malformed; expected {{'file': name, 'captions': [text, ...]}}")


def list_labelled(path: Path) -> list[tuple[Path, str]]:
    """Photos and clips with their labels, of a folder DIR/LABEL/FILE, sorted; nothing is opened.

    Raises:
        DataError: not a folder, none in any subfolder, or a link to nothing among those.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give one that holds LABEL/PHOTO or LABEL/CLIP files")
    inside = [entry for entry in sorted(path.iterdir()) if not is_hidden(entry.name)]
    for entry in inside:
        if not entry.exists():
            raise DataError(f"{entry} is a link to nothing, so a label may be missing; mend it or remove it")
    found = [
        (file, clean_label(file.parent.name))
        for folder in inside
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if is_media(file.name) and not file.is_dir()
    ]
    if not found:
        part = f"; of parts give one: {path / 'test'}" if (path / "test").is_dir() else ""  # as 'data split' makes
        raise DataError(f"no photos or clips in the subfolders of {path}; expected {path.name}/LABEL/PHOTO{part}")
    return found
