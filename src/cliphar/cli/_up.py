"""cliphar up: the API and the web page together, for a desk and for a container."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import FrameType
from typing import Annotated

import typer

from cliphar.cli._options import Model
from cliphar.errors import ClipharError

__all__ = ["up"]

_GRACE_S = 30.0


def up(
    model: Model = None,
    host: Annotated[str, typer.Option(envvar="CLIPHAR_HOST", help="Address that both listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="CLIPHAR_PORT", help="The API's port.")] = 8000,
    page_port: Annotated[int, typer.Option(envvar="CLIPHAR_APP_PORT", help="The web page's port.")] = 8501,
) -> None:
    """Start the API and the web page; if one of them ends, so does the other."""
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - a comparison, nothing is bound
    near = f"[{near}]" if ":" in near else near
    api, page = f"http://{near}:{port}", f"http://{near}:{page_port}"
    program = [sys.executable, "-m", "cliphar"]
    chosen = ["--model", model] if model else []
    signal.signal(signal.SIGTERM, _interrupt)  # the same way out as Ctrl-C
    # a session of their own: Ctrl-C on a terminal reaches us alone, and each child gets one SIGTERM from us
    serve = subprocess.Popen([*program, "serve", "--host", host, "--port", str(port), *chosen], start_new_session=True)
    children = {"the API": serve}
    try:
        _wait(f"{api}/readyz", "the API", children)
        children["the web page"] = subprocess.Popen(
            [*program, "app", "--host", host, "--port", str(page_port)],
            env=os.environ | {"CLIPHAR_API_URL": api},
            start_new_session=True,
        )
        _wait(f"{page}/_stcore/health", "the web page", children)
        print(f"API       {api}  (its documentation: {api}/docs)")
        print(f"Web page  {page}")
        print(f"Try       {shlex.join(_example(api))}", flush=True)
        while True:
            _ended(children)
            time.sleep(0.2)
    except KeyboardInterrupt:
        return  # how it is meant to end: status 0, as of serve and app
    finally:
        _stop(children)


def _example(api: str) -> list[str]:
    from cliphar.bundle import packaged

    photo, words = packaged("samples") / "portrait.jpg", "smiling for a portrait, taking a photo, cooking"
    return ["curl", "-F", f"images=@{photo}", "-F", f"labels={words}", f"{api}/v1/predict"]


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _ended(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, child in children.items():
        if child.poll() is not None:
            raise ClipharError(f"{name} ended with status {child.returncode}, so all of it stops; its lines say why")


def _wait(url: str, name: str, children: dict[str, subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        _ended(children)
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - an address of our own making
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ClipharError(f"{name} did not answer at {url} within two minutes; see its lines above")


def _stop(children: dict[str, subprocess.Popen[bytes]]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for child in children.values():
        if child.poll() is None:
            child.terminate()
    end = time.monotonic() + _GRACE_S
    for child in children.values():
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
