"""cliphar up: the API and the web page together, for a desk or a container."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from typing import Annotated

import typer

from cliphar.cli._options import BasePath, Drain, Host, Model, PagePort, RootPath
from cliphar.errors import ClipharError

__all__ = ["up"]


def up(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="CLIPHAR_PORT", min=1, max=65535, help="The API's port.")] = 8000,
    page_port: PagePort = 8501,
    root_path: RootPath = "",
    base_path: BasePath = "",
    drain: Drain = 30,
) -> None:
    """Start the API and the web page. If one of them stops, so does the other."""
    from cliphar.ui import past_proxies, require_streamlit

    require_streamlit()  # before the API is there
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - nothing is bound
    direct = past_proxies(near)
    near = f"[{near}]" if ":" in near else near
    api, page = f"http://{near}:{port}", f"http://{near}:{page_port}{base_path}"
    os.environ.update(direct, CLIPHAR_API_URL=api)
    stopping: list[int] = []
    # not raised, which could lose a child just started; SIGHUP is of a terminal that closes
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: stopping.append(number))
    children: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, url: str, command: str, port: int, *more: str) -> None:
        if stopping:
            return
        arguments = [sys.executable, "-m", "cliphar", command, "--host", host, "--port", str(port), *more]
        # a session of its own: Ctrl-C reaches us alone, and each child gets one SIGTERM from us
        children[name] = subprocess.Popen(arguments, start_new_session=True)
        end = time.monotonic() + 120
        while not (stopping or _answers(url)):
            _ended(children)
            if time.monotonic() > end:
                raise ClipharError(f"{name} did not answer at {url} in two minutes; see its lines above")
            time.sleep(0.1)

    try:
        chosen = ["--model", model] if model else []
        start("the API", f"{api}/readyz", "serve", port, "--root-path", root_path, "--drain", str(drain), *chosen)
        start("the web page", f"{page}/_stcore/health", "app", page_port, "--base-path", base_path)
        if not stopping:
            print(f"API       {api}  (its documentation: {api}/docs)")
            print(f"Web page  {page}")
            print(f"Try       {shlex.join(_example(api))}", flush=True)
        while not stopping:
            _ended(children)
            time.sleep(0.2)
    finally:
        _stop(children, drain + 5)


def _example(api: str) -> list[str]:
    from cliphar.bundle import packaged

    photo, words = packaged("samples") / "portrait.jpg", "labels=smiling at the camera, taking a photo, cooking"
    return ["curl", "-F", f"images=@{photo}", "-F", words, f"{api}/v1/predict"]


def _ended(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, child in children.items():
        if child.poll() is not None:
            raise ClipharError(f"{name} ended with status {child.returncode}, so all of it stops; its lines say why")


def _answers(url: str) -> bool:
    with suppress(OSError, HTTPException), urllib.request.urlopen(url, timeout=1):  # noqa: S310 - our own
        return True
    return False


def _stop(children: dict[str, subprocess.Popen[bytes]], grace_s: int) -> None:
    for child in children.values():
        child.terminate()
    end = time.monotonic() + grace_s
    for child in children.values():
        try:
            child.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
