"""cliphar up: both processes on real sockets, stopped together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO

import pytest

from cliphar.cli._up import up
from cliphar.client import Client
from cliphar.errors import ClipharError
from cliphar.ui import launch
from serving_process import free_port

PROXY = {"http_proxy": "http://127.0.0.1:9"}  # for others: through it no way leads back to this machine


def test_the_page_asks_a_service_of_its_own_machine_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, str] = {}
    monkeypatch.setattr("os.execve", lambda _path, _arguments, environment: started.update(environment))
    monkeypatch.setenv("no_proxy", "intranet")
    for url, host in ("http://127.0.0.1:9", "127.0.0.1"), ("http://[::1]:9", "::1"):
        launch("127.0.0.1", free_port(), api=url)
        assert (started["no_proxy"], started["NO_PROXY"]) == (f"intranet,{host}",) * 2
    monkeypatch.setenv("http_proxy", PROXY["http_proxy"])
    with pytest.raises(ClipharError, match="the proxy of HTTP_PROXY or ALL_PROXY; NO_PROXY=api goes past it"):
        Client("http://api:8000", retry_s=0).model()
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(ClipharError, match=r"running\?$"):
        Client("http://localhost:9", retry_s=0).model()


def test_without_the_page_s_packages_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streamlit", None)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ClipharError, match=r"pip install 'cliphar\[app\]'"):
        up(None, "127.0.0.1", free_port(), free_port())


def lines_until(stream: IO[str], start: str) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError("".join(lines))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def healthy(command: str, **variables: str) -> bool:
    """What the containers' health check says of a process that was started so."""
    check = Path(__file__).parents[1] / "docker" / "healthcheck.py"
    started = [sys.executable, "-c", "import time; time.sleep(60)", *command.split()]
    with subprocess.Popen(started) as process:
        asked = [sys.executable, str(check), str(process.pid)]
        done = subprocess.run(asked, env=PROXY | variables, capture_output=True, check=False)
        process.kill()
    assert b"Traceback" not in done.stderr
    return done.returncode == 0


@pytest.fixture
def running(clean_env: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str], str]]:
    api, page = free_port(), free_port()
    command = [sys.executable, "-m", "cliphar", "up", "--port", str(api), "--page-port", str(page)]
    with subprocess.Popen(command, env=clean_env | PROXY, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, lines_until(process.stdout, "Try"), f"http://127.0.0.1:{api}"
        finally:
            process.terminate()
            process.wait(60)


def test_it_prints_addresses_and_a_command_that_works(
    running: tuple[subprocess.Popen[str], list[str], str], tmp_path: Path
) -> None:
    process, lines, api = running
    addresses = [word for line in lines for word in line.split() if word.startswith("http://")]
    assert addresses[0] == api
    with urllib.request.urlopen(addresses[-2 if "/v1/" in addresses[-1] else -1]) as page:  # noqa: S310 - ours
        assert b"<title>" in page.read()
    command = next(line for line in lines if line.startswith("Try")).removeprefix("Try").strip()
    assert command.startswith("curl ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "label" in json.dumps(json.loads(done.stdout))
    page_address = next(line.split()[-1] for line in lines if line.startswith("Web page"))
    one, two = (address.rpartition(":")[2] for address in (api, page_address))
    assert healthy(f"tini -- cliphar up --port {one} --page-port={two}")
    assert healthy("tini -- cliphar up", CLIPHAR_PORT=one, CLIPHAR_APP_PORT=two)
    assert healthy(f"/opt/cliphar/bin/cliphar serve --port {one}", CLIPHAR_PORT="9", CLIPHAR_APP_PORT="9")
    assert healthy(f"docker-init -- tini -- cliphar app --port {two}", CLIPHAR_PORT="9")
    assert healthy("sh", CLIPHAR_PORT=one, CLIPHAR_APP_PORT="9")
    assert healthy("tini -- cliphar predict", CLIPHAR_PORT="9")
    for wrong in (
        f"cliphar up --port {one} --page-port 9",
        "cliphar serve --port 9",
        f"cliphar app --base-path=/x --port {two}",
    ):
        assert not healthy(wrong)
    both = children(process.pid)
    assert len(both) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not any(alive(pid) for pid in both)


def test_an_image_of_no_known_variant_is_refused_in_one_line() -> None:
    command = [sys.executable, "docker/environment.py", sys.executable, "api", "typo"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no VARIANT=typo: it is one of cpu, openvino, cuda, tensorrt\n")


@pytest.mark.parametrize("which", [0, 1], ids=["API", "page"])
def test_if_one_ends_all_ends(running: tuple[subprocess.Popen[str], list[str], str], which: int) -> None:
    process, _, _ = running
    both = children(process.pid)
    os.kill(both[which], signal.SIGKILL)
    assert process.wait(60) == 1
    assert not any(alive(pid) for pid in both)


def test_another_s_port_is_said_in_lines(clean_env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # it speaks first, and not HTTP

        def greet() -> None:
            with suppress(OSError):
                while True:
                    with taken.accept()[0] as one:
                        one.sendall(b"220 mail\r\n")

        Thread(target=greet, daemon=True).start()
        command = [sys.executable, "-m", "cliphar", "up", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, env=clean_env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 2)
    assert "choose another" in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_while_a_process_is_started_leaves_none(clean_env: dict[str, str], tmp_path: Path, stop: int) -> None:
    program = f"""
import os, signal, subprocess
from cliphar.cli._up import up

class Stopped(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), {stop:d})

    def wait(self, timeout=None):
        print(timeout)
        return super().wait(timeout)

subprocess.Popen = Stopped
up(None, "127.0.0.1", {free_port()}, {free_port()}, drain=90)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    pid, waited_s = done.stdout.split()
    assert not alive(int(pid))
    assert float(waited_s) > 90
