"""cliphar doctor: what this machine offers, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from importlib import metadata
from pathlib import Path

import typer

from cliphar._version import __version__
from cliphar.errors import BundleError

__all__ = ["doctor"]


def doctor() -> None:
    """Say what is here, what is missing, and the command that mends it."""
    from cliphar.bundle import find_bundle, list_models, store
    from cliphar.runtime import available_providers, cpu_quota

    bad = 0

    def say(good: bool | None, what: str, mend: str = "") -> None:
        nonlocal bad
        bad += good is False
        mark = {True: "ok  ", False: "BAD ", None: "    "}[good]
        print(f"{mark} {what}" + (f"\n     -> {mend}" if mend else ""))

    say(None, f"cliphar {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "tokenizers", "fastapi", "streamlit", "torch"):
        try:
            say(None, f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    seen, allowed = os.cpu_count() or 1, cpu_quota()
    say(True, f"CPU: {allowed} of {seen} cores may be used")
    threads = os.environ.get("CLIPHAR_THREADS", "")
    if threads.isdigit() and int(threads) > allowed:
        say(False, f"CLIPHAR_THREADS={threads} is more than the {allowed} allowed: they fight", "unset CLIPHAR_THREADS")
    providers = available_providers()
    say(True, f"ONNX Runtime providers: {', '.join(providers)}; '{providers[0]}' is taken first")
    say(*_gpu(providers))
    say(*_shared_memory())
    for variable, port in (("CLIPHAR_PORT", 8000), ("CLIPHAR_APP_PORT", 8501)):
        say(*_port(variable, port))
    for model in list_models():
        if model.state == "to pull":
            say(None, f"model {model.name}: not complete", f"cliphar model pull {model.name}")
            continue
        try:
            find_bundle(model.path)
            say(True, f"model {model.name}: complete and unaltered")
        except BundleError as error:
            say(False, f"model {model.name}: {error}", f"cliphar model pull {model.name}")
    chosen = os.environ.get("MODEL_PATH")
    if chosen:
        try:
            find_bundle(chosen)
            say(True, f"MODEL_PATH={chosen}: a whole bundle")
        except BundleError as error:
            say(False, f"MODEL_PATH={chosen}: {error}", "point it at a bundle's directory or unset it")
    home = store()
    parent = next(p for p in (home, *home.parents) if p.exists())
    writable = os.access(parent, os.W_OK)
    say(
        writable or None,
        f"models are stored in {home}" + ("" if writable else f" (not writable by uid {os.getuid()})"),
        "" if writable else "set CLIPHAR_HOME to a folder that is, or: docker run -v cliphar-models:/models ...",
    )
    if bad:
        raise typer.Exit(1)


def _gpu(providers: list[str], devices: Path = Path("/dev")) -> tuple[bool | None, str, str]:
    """Whether an NVIDIA GPU can be used; else the first thing that is missing, from the driver upwards."""
    if not any(devices.glob("nvidia[0-9]*")):
        if shutil.which("nvidia-smi"):
            return False, "GPU: the driver's tools are here but no device is", "sudo nvidia-modprobe -c 0 -u"
        inside = Path("/.dockerenv").exists()
        mend = "if the host has one: docker run --gpus all ..., after nvidia-ctk runtime configure" if inside else ""
        return None, "GPU: none is seen; the CPU is used", mend
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False, "GPU: hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"
    if not {"cuda", "tensorrt"} & set(providers):
        mend = "pip uninstall onnxruntime && pip install onnxruntime-gpu, or the image built with VARIANT=cuda"
        return False, "GPU: seen, but this ONNX Runtime is the CPU's build", mend
    return True, "GPU: seen, and ONNX Runtime can use it", ""


def _shared_memory(place: Path = Path("/dev/shm")) -> tuple[bool | None, str, str]:  # noqa: S108
    """Loaders of training data hand photos over in it; a container gets 64 MB unless told otherwise."""
    if not place.is_dir():
        return None, "shared memory: this system has no /dev/shm", ""
    size = shutil.disk_usage(place).total / 1e6
    if size < 256:
        return None, f"shared memory: {size:.0f} MB, little for training", "docker run --shm-size 1g ..."
    return True, f"shared memory: {size:.0f} MB", ""


def _port(variable: str, default: int) -> tuple[bool | None, str, str]:
    """Whether the port that a server of ours would take is free. One that is taken may well be ours."""
    value = os.environ.get(variable, str(default))
    if not value.isdigit() or int(value) > 65535:
        return False, f"{variable}={value} is no port", f"export {variable}={default}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(value)))
        except OSError as error:
            return None, f"port {value}: {error.strerror}", f"if it is not cliphar's: export {variable}=PORT"
    return True, f"port {value}: free", ""
