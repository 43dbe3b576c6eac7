"""cliphar doctor: what this machine offers, and what is wrong with it."""

from __future__ import annotations

import errno
import logging
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import typer

from cliphar._version import __version__
from cliphar.errors import BundleError, ClipharError

__all__ = ["doctor"]

_PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy", "pillow", "av", "tokenizers", "fastapi",
    "streamlit", "torch", "mlflow",
)  # fmt: skip
# by a file's suffix: the module, our extra that installs it, and the image that has it
_RUN_BY = {
    ".xml": ("openvino", "openvino", "the image built with VARIANT=openvino"),
    ".plan": ("tensorrt", "", "the image built with VARIANT=tensorrt"),
    ".pt": ("torch", "train", "the image for training"),
    ".pt2": ("torch", "train", "the image for training"),
}
_LITTLE_MB = 512
_FEW_THREADS = 64
Finding = tuple[bool | None, str, str]
"""Good, bad or neither; what was found; the command that mends it, or nothing."""


def doctor() -> None:
    """Check this machine, and say how to fix what is wrong."""
    from cliphar.runtime import available_providers

    logging.getLogger("cliphar.runtime").setLevel(logging.ERROR)  # its warnings name this command
    providers = available_providers()
    bad = 0
    print(f"     cliphar {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for good, what, mend in (
        *_versions(),
        *_processors(),
        _memory(),
        *_threads(),
        (True, f"ONNX Runtime providers: {', '.join(providers)}; '{providers[0]}' is taken first", ""),
        _gpu(providers),
        _shared_memory(),
        _port("CLIPHAR_PORT", 8000),
        _port("CLIPHAR_APP_PORT", 8501),
        *_models(),
        *_folders(),
    ):
        bad += good is False
        mark = {True: "ok  ", False: "BAD ", None: "    "}[good]
        print(f"{mark} {what}" + (f"\n     -> {mend}" if mend else ""))
    if bad:
        raise typer.Exit(1)


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def _versions() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield None, f"{name} {metadata.version(name)}", ""
        except metadata.PackageNotFoundError:
            continue


def _processors() -> Iterator[Finding]:
    from cliphar.runtime import cpu_quota

    allowed = cpu_quota()
    yield True, f"CPU: {allowed} of {os.cpu_count() or 1} cores may be used", ""
    for variable, what in (("CLIPHAR_THREADS", "threads fight"), ("CLIPHAR_WORKERS", "workers fight")):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > allowed:
            yield (
                False,
                f"{variable}={value} is more than the {allowed} cores allowed: {what} for them",
                f"unset {variable}",
            )


def _memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """What the container's cgroup (v2 or v1) allows, for more than that is answered with SIGKILL."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        try:
            allowed = int(file.read_text()) / 1e6
        except (OSError, ValueError):
            continue
        if allowed < _LITTLE_MB:
            return False, f"memory: {allowed:.0f} MB may be used; more ends in status 137", "docker run --memory 1g ..."
        if allowed < 1e9:  # MB; no limit is written as a huge number by version 1
            return True, f"memory: {allowed:.0f} MB may be used", ""
    return True, "memory: as much as the machine has", ""


def _threads(cgroup: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """Whether the container's cgroup (v2 or v1) allows so few threads that one cannot start."""
    for file in (cgroup / "pids.max", cgroup / "pids" / "pids.max"):
        with suppress(OSError, ValueError):
            allowed = int(file.read_text())
            if allowed < _FEW_THREADS:
                yield (
                    False,
                    f"threads: {allowed} may run at a time, those of all processes",
                    "docker run --pids-limit 256 ...",
                )


def _gpu(providers: list[str], devices: Path = Path("/dev")) -> Finding:
    """Whether an NVIDIA GPU can be used; else the first thing that is missing, from the driver upwards."""
    if not any(devices.glob("nvidia[0-9]*")):
        if shutil.which("nvidia-smi"):
            return False, "GPU: the driver's tools are here but no device is", "sudo nvidia-modprobe -c 0 -u"
        mend = "if the host has one: docker run --gpus all ..., after nvidia-ctk runtime configure"
        return None, "GPU: none is seen; the CPU is used", mend if _in_container() else ""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False, "GPU: hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"
    if "cuda" not in providers:
        mend = "pip uninstall onnxruntime && pip install onnxruntime-gpu, or the image built with VARIANT=cuda"
        return False, "GPU: seen, but this ONNX Runtime is the CPU's build", mend
    return _cuda()


def _cuda() -> Finding:
    """Whether ONNX Runtime finds CUDA's libraries and a driver for them, by running a model."""
    from cliphar.bundle import DEFAULT_MODEL, find_bundle
    from cliphar.runtime import OnnxRuntime

    try:
        if OnnxRuntime(find_bundle(DEFAULT_MODEL), provider="cuda").provider == "cuda":
            return True, "GPU: seen, and ONNX Runtime uses it", ""
        why = "ONNX Runtime does not find CUDA's libraries, or they are newer than the driver"
    except ClipharError as error:
        why = str(error)
    mend = "pip install 'onnxruntime-gpu[cuda,cudnn]', or the image built with VARIANT=cuda on CUDA's base image"
    return False, f"GPU: seen, but {why}", mend


def _shared_memory(place: Path = Path("/dev/shm")) -> Finding:  # noqa: S108
    """Loaders of training data hand photos over in it; a container gets 64 MB unless told otherwise."""
    if not place.is_dir():
        return None, "shared memory: this system has no /dev/shm", ""
    size = shutil.disk_usage(place).total / 1e6
    if size < 256:
        return None, f"shared memory: {size:.0f} MB, little for training", "docker run --shm-size 1g ..."
    return True, f"shared memory: {size:.0f} MB", ""


def _port(variable: str, default: int) -> Finding:
    """Whether the port that a server of ours would take is free. One that is taken may well be ours."""
    value = os.environ.get(variable) or str(default)  # empty is as good as none, as the servers have it
    if not value.isdigit() or int(value) > 65535:
        return False, f"{variable}={value} is no port", f"export {variable}={default}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(value)))
        except OSError as error:
            return None, f"port {value}: {error.strerror}", f"if it is not cliphar's: export {variable}=PORT"
    return True, f"port {value}: free", ""


def _models() -> Iterator[Finding]:
    from cliphar.bundle import PULLS, find_bundle, list_models

    for model in list_models():
        pull = f"cliphar model pull {model.name}" if model.name in PULLS else ""
        if model.state == "to pull":
            yield None, f"model {model.name}: not complete", pull
            continue
        try:
            runtimes = find_bundle(model.path).runtimes
        except BundleError as error:
            yield False, f"model {model.name}: {error}", pull
            continue
        yield True, f"model {model.name}: complete and unaltered; runs as {', '.join(runtimes)}", ""
        for name, file in runtimes.items():
            engine, extra, image = _RUN_BY.get(Path(file).suffix, ("onnxruntime", "", ""))
            if find_spec(engine) is None:
                mend = image if _in_container() or not extra else f"pip install 'cliphar[{extra}]', or {image}"
                yield None, f"model {model.name}: nothing here runs its {name}", mend
    chosen = os.environ.get("MODEL_PATH")
    if chosen:
        try:
            find_bundle(chosen)
            yield True, f"MODEL_PATH={chosen}: a whole bundle", ""
        except BundleError as error:
            yield False, f"MODEL_PATH={chosen}: {error}", "point it at a bundle's directory or unset it"


def _folders() -> Iterator[Finding]:
    from cliphar.bundle import store

    state = os.environ.get("CLIPHAR_STATE")
    yield _folder("temporary files are written to", Path(os.environ.get("TMPDIR") or "/tmp"), "TMPDIR", "--tmpfs /tmp")  # noqa: S108
    yield _folder("models are stored in", store(), "CLIPHAR_HOME", "-v cliphar_models:/models")
    yield _folder(
        "what a service is taught is kept in",
        Path(state) if state else store().parent / "state",
        "CLIPHAR_STATE",
        "-v cliphar_models:/models",
    )
    runs = Path("runs")
    if runs.exists():
        yield _folder("trainings write to", runs.resolve(), "", '-u "$(id -u):$(id -g)"')


def _folder(purpose: str, folder: Path, variable: str, option: str) -> Finding:
    """Whether this user may write there, or make it, by writing: a mount's own rules are not in the file's mode."""
    place = next(parent for parent in (folder, *folder.parents) if os.access(parent, os.F_OK))
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / 1e9
            return True, f"{purpose} {folder}: writable, {free:.1f} GB free", ""
    except OSError as error:
        mend = f"sudo chown -R {os.getuid()} {place}" + (f", or export {variable}=DIR" if variable else "")
        if _in_container():
            owned = error.errno == errno.EACCES and place == folder  # a volume that another user began to fill
            mend = (
                f"docker run -u {place.stat().st_uid} ..., or another volume" if owned else f"docker run {option} ..."
            )
        return None, f"{purpose} {folder}: not writable by uid {os.getuid()} ({error.strerror})", mend
