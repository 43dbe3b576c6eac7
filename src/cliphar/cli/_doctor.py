"""cliphar doctor: what this machine offers, and what is wrong with it."""

from __future__ import annotations

import os
import platform
from importlib import metadata

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
    for name in ("onnxruntime", "numpy", "pillow", "tokenizers"):
        say(None, f"{name} {metadata.version(name)}")
    seen, allowed = os.cpu_count() or 1, cpu_quota()
    say(True, f"CPU: {allowed} of {seen} cores may be used")
    providers = available_providers()
    say(True, f"ONNX Runtime providers: {', '.join(providers)}; '{providers[0]}' is taken first")
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
        "" if writable else "set CLIPHAR_HOME to a folder that is",
    )
    if bad:
        raise typer.Exit(1)
