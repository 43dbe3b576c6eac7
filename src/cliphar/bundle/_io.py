"""A bundle on disk: verified when read, whole or absent when written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cliphar.bundle._schema import SCHEMA_VERSION, BundleInfo, FileInfo, is_inside
from cliphar.errors import BundleError, UsageError, naming, printable

__all__ = [
    "BUNDLE_JSON",
    "Bundle",
    "alone",
    "check_place",
    "read_bundle",
    "sha256_file",
    "whole_file",
    "workplace",
    "write_bundle",
    "write_whole",
]

BUNDLE_JSON = "bundle.json"
_HEAD = "head.safetensors"
_NEW_S = 5.0  # a directory may not be locked yet


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been read and, unless asked otherwise, verified."""

    path: Path
    info: BundleInfo

    def file(self, name: str) -> Path:
        """Path of a file the bundle lists; BundleError if it lists none of that name."""
        if name not in self.info.files:
            raise BundleError(
                f"bundle '{self.info.name}' has no {name}: it holds {', '.join(sorted(self.info.files))}; "
                "make it again or export what is missing"
            )
        return self.path / name

    def same_file(self, name: str) -> Path:
        """As :meth:`file`, for what is opened later: BundleError where another bundle has taken this one's place."""
        path = self.file(name)
        try:
            same = sha256_file(path) == self.info.files[name].sha256
        except OSError:
            same = False
        if not same:
            raise BundleError(f"{path} is no longer what was loaded; load the model that is there now")
        return path

    @property
    def runtimes(self) -> dict[str, str]:
        """The image graph's file of each runtime: ``onnx``, the reference, and what export added and verified."""
        added = {file.runtime: name for name, file in self.info.files.items() if file.runtime and file.parity}
        return {"onnx": "image.onnx"} | added

    def class_vectors(self) -> NDArray[np.float32]:
        """The labels' vectors from head.safetensors: float32 [C,D], unit length, in the order of ``info.labels``."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            vectors = load_file(self.file(_HEAD))["class_vectors"]
        # TypeError and AttributeError: a type that numpy lacks, such as bfloat16
        except (SafetensorError, KeyError, OSError, TypeError, AttributeError) as error:
            raise BundleError(
                f"cannot read {_HEAD} of bundle '{self.info.name}': {error}; make the bundle again"
            ) from error
        expected = (len(self.info.labels), self.info.embedding_dim)
        if vectors.shape != expected or vectors.dtype != np.float32:
            raise BundleError(
                f"{_HEAD} of bundle '{self.info.name}' holds {vectors.dtype} {vectors.shape}, "
                f"bundle.json promises float32 {expected}; make the bundle again"
            )
        return vectors


def read_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Read a bundle's directory.

    Args:
        path: the directory that holds bundle.json.
        verify: also compare the size and sha256 of every listed file.

    Raises:
        BundleError: missing, malformed, newer than this version reads, or a file absent, cut short or altered.
    """
    root = _nameable(Path(path))
    manifest = root / BUNDLE_JSON
    try:
        raw = json.loads(manifest.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"no bundle at {root}: it has no {BUNDLE_JSON}; see 'cliphar model list'") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"cannot read {manifest}: {error}; {_mend(root, error, 'make')}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{manifest} has schema {version}, this cliphar reads up to {SCHEMA_VERSION}; upgrade cliphar"
        )
    try:
        info = BundleInfo.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise BundleError(f"{manifest} is not valid: {where}: {first['msg']}; make the bundle again") from error
    for name, expected in info.files.items():
        try:
            _check_file(root, name, expected, verify=verify)
        except OSError as error:
            raise BundleError(f"cannot read {name} of bundle {root}: {error}; {_mend(root, error, 'pull')}") from error
    return Bundle(root, info)


def _nameable(root: Path) -> Path:
    """BundleError where the name is no UTF-8: engines take paths as text, and could open no file of the bundle."""
    if (shown := printable(str(root))) != str(root):
        raise BundleError(f"no bundle can be at {shown}: the name is no UTF-8, which engines need; rename the folder")
    return root


def _mend(root: Path, error: Exception, again: str) -> str:
    if isinstance(error, PermissionError):  # as of a folder of one user, mounted in a container that runs as another
        return f"let this user read it: chmod -R a+rX {root}"
    return f"copy or {again} the bundle again"


def _check_file(root: Path, name: str, expected: FileInfo, *, verify: bool) -> None:
    file = root / name
    if not file.is_file():
        raise BundleError(f"bundle {root} lacks {name}; copy or pull the bundle again")
    if not file.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{name} of bundle {root} is a link that leaves it; put the file itself there")
    size = file.stat().st_size
    if size != expected.bytes:
        kind = "cut short" if size < expected.bytes else "longer than it should be"
        raise BundleError(
            f"{name} of bundle {root} is {kind} ({size:,} of {expected.bytes:,} bytes); copy or pull the bundle again"
        )
    if verify and sha256_file(file) != expected.sha256:
        raise BundleError(f"{name} of bundle {root} was altered: its sha256 differs; copy or pull the bundle again")


@contextmanager
def _staging(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory beside ``target`` that takes its place if the block ends well, and vanishes if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        for file in work.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _take_place(work, target, overwrite=overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take_place(work: Path, target: Path, *, overwrite: bool) -> None:
    """Rename ``work`` to ``target``; what stands there is set aside if it may be, and put back on failure.

    A directory can only be renamed onto nothing or onto an empty one, so of several writers at once the last wins.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    old = aside / "0"
    try:
        for attempt in range(100):
            if overwrite:
                with suppress(FileNotFoundError):
                    old = target.rename(aside / str(attempt))
            try:
                work.rename(target)
                break
            except OSError as error:
                if not overwrite or error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 99:
                    raise
    except BaseException as error:  # Ctrl-C too, between the two renames
        with suppress(OSError):
            old.rename(target)
        if not any(aside.iterdir()) or target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        why = f"{error.strerror}; see what writes there, then try again"
        if error.errno == errno.EBUSY:
            why = "it is mounted, and nothing can take a mount's place; give a folder inside it, or another"
        raise BundleError(f"cannot put a bundle at {target}: {why}") from error
    for before in aside.iterdir():
        if not before.is_symlink():
            _keep_strays(before, target)
    shutil.rmtree(aside, ignore_errors=True)


def _keep_strays(before: Path, root: Path) -> None:
    """Move what is not the bundle's own from its directory ``before``; nothing if that does not say what is."""
    try:
        own = {BUNDLE_JSON, *json.loads((before / BUNDLE_JSON).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for file in list(before.rglob("*")):
        name = file.relative_to(before)
        if name.as_posix() not in own and (file.is_file() or file.is_symlink()):
            with suppress(OSError):  # the bundle's own stands there now, or another writer's
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if not (root / name).exists():
                    file.rename(root / name)


def check_place(target: Path) -> None:
    """UsageError if nothing can be put at ``target``; asked before the work, not after."""
    there = next(place for place in target.absolute().parents if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UsageError(f"cannot write {target}: {there} is not a folder that can be written to")


def _may_replace(root: Path) -> bool:
    if (root / BUNDLE_JSON).is_file():
        return True
    try:
        return not any(root.iterdir())
    except FileNotFoundError:  # another writer has just set it aside
        return True
    except NotADirectoryError:
        return False


def write_bundle(
    target: Path | str,
    info: BundleInfo,
    files: Mapping[str, Path | bytes],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle so that ``target`` is either the whole of it or what it was before.

    Args:
        target: the directory to make.
        info: everything but the digests; an entry in ``info.files`` keeps its runtime and parity.
        files: the bundle's path of each file, and its source file or its content.
        overwrite: replace a bundle that is already there; files in its directory that are none of its own stay.

    Raises:
        BundleError: ``target`` exists and is not to be replaced, or is no bundle or ``.``; or a file's path leaves it.
    """
    root = _nameable(Path(target))
    for name in files:
        if not is_inside(name):
            raise BundleError(f"path {name!r} leaves the bundle; give one below it, with forward slashes")
    if root.name in ("", ".."):  # a folder is replaced by renaming it
        raise BundleError(f"{root} cannot be replaced from inside; go out of it and give the folder's name")
    if root.exists():
        if not overwrite:
            raise BundleError(f"{root} exists; choose another place or ask to overwrite it")
        if not _may_replace(root):
            raise BundleError(f"{root} exists and is not a bundle; choose another place")
    with naming(root), _staging(root, overwrite=overwrite) as work:
        entries: dict[str, FileInfo] = {}
        for name, content in sorted(files.items()):
            file = work / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                shutil.copyfile(content, file)
            known = info.files.get(name)
            entries[name] = FileInfo(
                sha256=sha256_file(file),
                bytes=file.stat().st_size,
                runtime=known.runtime if known else None,
                parity=known.parity if known else None,
            )
        complete = BundleInfo.model_validate(info.model_dump() | {"files": entries})
        (work / BUNDLE_JSON).write_text(complete.model_dump_json(indent=1) + "\n", encoding="utf-8")
        read_bundle(work)
    return Bundle(root, complete)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, so that of two that add to a bundle in ``folder`` neither loses what the other adds."""
    with _locked(folder, wait=True):
        yield


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden directory beside ``target`` to build it in; it vanishes, and so do those that killed processes left."""
    for left in target.parent.glob(f".{target.name}.*"):
        with suppress(OSError), _locked(left, wait=False) as free:  # gone by now
            if free and time.time() - left.stat().st_mtime > _NEW_S:
                shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _locked(work, wait=False):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a directory; False where another process has it and this one does not ``wait``, or there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle, held = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):  # in use, or a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write in the block, of the same name; it replaces ``path`` if the block ends well, and vanishes if not.

    Whoever reads ``path`` meanwhile finds the old file or the new one, and never a part. A link whose folder is there
    stays one.
    """
    path = path.resolve() if path.is_symlink() and path.resolve().parent.is_dir() else path
    with naming(path), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        partial = Path(work) / path.name
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by :func:`whole_file`, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(content)
