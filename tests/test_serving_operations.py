"""A service that is restarted, reloaded, overloaded and misused: nothing that it took in is lost."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file, save
from structlog.testing import capture_logs
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import CloseCode, Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from cliphar.bundle import packaged, read_bundle, write_bundle
from cliphar.client import AsyncClient, Client
from cliphar.errors import ClipharError, UsageError
from cliphar.recognizer import Prediction
from cliphar.serving import Service, Settings, create_app
from cliphar.serving._middleware import below
from serving_process import free_port, problem, serving

HEAD = "{} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {}\r\n\r\n"


def dial(url: str, timeout: float = 60) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port or 0), timeout)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "MODEL_PATH" and not k.startswith(("CLIPHAR_", "OTEL_"))}
    source = str(Path(__file__).parents[1] / "src")
    return kept | {"CLIPHAR_STATE": str(tmp_path_factory.mktemp("state")), "PYTHONPATH": source}


def test_a_restart_under_fire_loses_no_request(env: dict[str, str], photos: list[Path]) -> None:
    port, content = free_port(), photos[0].read_bytes()
    stop = threading.Event()
    answered: Counter[str] = Counter()

    async def caller(number: int) -> None:
        async with AsyncClient(f"http://127.0.0.1:{port}", retry_s=60) as client:
            i = 0
            while not stop.is_set():
                i += 1
                (answer,) = await client.predict([content + f"{number}.{i}".encode()])
                answered[type(answer).__name__] += 1

    async def callers() -> None:
        await asyncio.gather(*(caller(number) for number in range(8)))

    def wait_for(count: int) -> None:
        end = time.monotonic() + 60
        while answered["Prediction"] < count and time.monotonic() < end:
            time.sleep(0.1)

    with serving(env, "--port", str(port)) as (_, first):
        hammer = threading.Thread(target=lambda: outcome.append(asyncio.run(callers())))
        outcome: list[None] = []
        hammer.start()
        wait_for(8)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 0
    before = answered["Prediction"]
    with serving(env, "--port", str(port)):
        wait_for(before + 20)
        stop.set()
        hammer.join(60)
    assert outcome == [None]  # no caller met an error
    assert set(answered) == {"Prediction"}
    assert answered["Prediction"] >= before + 20 > 20  # both answered


def test_a_new_model_without_downtime(env: dict[str, str], tmp_path: Path, photos: list[Path]) -> None:
    model = tmp_path / "model"
    shutil.copytree(packaged("mini"), model)
    content = photos[0].read_bytes()
    with (
        serving(env, "--model", str(model)) as (url, process),
        Client(url, retry_s=0) as client,
        connect(f"{url.replace('http', 'ws')}/v1/stream") as camera,
    ):
        for _ in range(2):
            camera.send(content)
            before = json.loads(camera.recv(60))
            assert "label" in before
        slow = dial(url)
        slow.sendall(HEAD.format("POST /v1/predict", len(content)).encode() + content[:100])
        assert client.model()["description"].startswith("A small")
        manifest = (model / "bundle.json").read_text()
        (model / "bundle.json").write_text("{")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert isinstance(client.predict(photos[:1])[0], Prediction)  # a damaged one changes nothing
        for name in ("Another", "The third"):  # though the first still has a request to finish
            new = manifest.replace('"A small', f'"{name} small').replace('"name": "mini"', f'"name": "{name[:3]}"')
            (model / "bundle.json").write_text(new)
            process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 60
            while not client.model()["description"].startswith(name):
                assert isinstance(client.predict(photos[:1])[0], Prediction)
                assert time.monotonic() < end
                time.sleep(0.05)
        assert isinstance(client.predict(photos[:1])[0], Prediction)
        assert client.predict(photos[:1], ["waving", "sleeping"])
        shown = re.findall(r'\ncliphar_model_info{name="(.*?)",.*} (.*)', httpx.get(f"{url}/metrics").text)
        assert dict(shown) == {"mini": "0.0", "Ano": "0.0", "The": "1.0"}
        slow.sendall(content[100:])  # what the old model began it finishes
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        slow.close()
        camera.send(content)
        after = json.loads(camera.recv(60))  # and a camera goes on with the new one, on the same clock
        assert "label" in after
        assert [one["end_s"] for one in after["closed"]] == [before["time_s"]]
        assert before["time_s"] < after["since_s"] == after["time_s"]


def test_a_model_that_was_replaced_leaves_memory(env: dict[str, str]) -> None:
    program = """
import gc, signal, threading, time
from cliphar.serving import Service, Settings, run

def watch():
    found = lambda: gc.unfreeze() or {id(one) for one in gc.get_objects() if isinstance(one, Service)}
    services, before = [], set()
    for _ in range(3):
        end = time.monotonic() + 60
        while (len(found()) != 1 or found() == before) and time.monotonic() < end:
            time.sleep(0.1)
        before = found()
        services.append(len(before))
        signal.raise_signal(signal.SIGHUP)
    print(services, flush=True)
    signal.raise_signal(signal.SIGTERM)

threading.Thread(target=watch).start()
run(Settings(), "127.0.0.1", 0, 1)
"""
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "[1, 1, 1]\n", done.stderr


def test_what_is_taught_belongs_to_one_model(env: dict[str, str], tmp_path: Path, photos: list[Path]) -> None:
    model = tmp_path / "model"
    shutil.copytree(packaged("mini"), model)
    with serving(env, "--model", str(model)) as (url, process), Client(url) as client:
        client.teach("waving", [photo.read_bytes() for photo in photos])
        info = read_bundle(model).info
        head = load_file(model / "head.safetensors")
        other = save({"class_vectors": np.ascontiguousarray(head["class_vectors"][::-1])})
        files: dict[str, Path | bytes] = {name: packaged("mini") / name for name in info.files}
        write_bundle(model, info, files | {"head.safetensors": other}, overwrite=True)
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while httpx.get(f"{url}/v1/actions").json():
            assert time.monotonic() < end
            time.sleep(0.05)
    with serving(env) as (url, _):
        assert httpx.get(f"{url}/v1/actions").json() == {
            "waving": len(photos)
        }  # it is there for the model that learnt it


def test_what_nobody_foresaw_is_a_problem_too(env: dict[str, str], tmp_path: Path, photos: list[Path]) -> None:
    service = Service.start(Settings(state=tmp_path))
    service.recognizer = None  # type: ignore[assignment]
    app = below("/x", create_app(service))
    # the trace is not printed: structlog as nobody set it up draws every frame's values, which takes seconds
    with capture_logs() as logs, TestClient(app, raise_server_exceptions=False) as client:
        assert "its log says more" in problem(client.post("/v1/predict", files={"images": photos[0].read_bytes()}), 500)
        assert 'status="500"' in client.get("/metrics").text
        wrong = (client.get("/nowhere"), client.post("/v1/predict", json={}), client.put("/v1/labels/a", json=5))
        assert all(one.json()["detail"].endswith("; see /x/docs") for one in wrong)
    assert [type(line["exc_info"]) for line in logs if line["event"] == "failed"] == [AttributeError]
    service.engine.close()


def test_bodies_are_bounded_in_all(env: dict[str, str]) -> None:
    with serving(env, "--max-body", "1") as (url, _), ExitStack() as stack:

        def ask(what: str, size: int) -> socket.socket:
            one = stack.enter_context(dial(url))
            one.sendall(HEAD.format(what, size).encode() + b"x")
            return one

        for what in ("POST /v1/predict", "PUT /v1/labels/x") * 2:
            ask(what, 2**20)
        for _ in range(2):  # a refusal gives nothing back that it did not take
            assert ask("POST /v1/predict", 2**20).recv(100).startswith(b"HTTP/1.1 503")


def test_frames_are_bounded_in_all(env: dict[str, str], photos: list[Path]) -> None:
    def part(camera: ClientConnection, size: int) -> None:
        camera.socket.sendall(Frame(Opcode.BINARY, b"x" * size, fin=False).serialize(mask=True))

    with serving(env, "--max-body", "1") as (url, _), ExitStack() as stack:
        address = f"{url.replace('http', 'ws')}/v1/stream"
        cameras = [stack.enter_context(connect(address)) for _ in range(6)]
        largest, *others, last = cameras
        part(largest, 2**20 - 100)
        for other in others:
            part(other, 2**20 - 2**17)
        with pytest.raises(ConnectionClosed) as closed:
            largest.recv(60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == CloseCode.TRY_AGAIN_LATER
        last.send(photos[0].read_bytes())
        assert "label" in json.loads(last.recv(60))
        for other in others:
            with pytest.raises(TimeoutError):
                other.recv(0.01)


def test_a_page_of_another_site_sends_nothing(api: str, photos: list[Path]) -> None:
    """A browser sends a form without asking first, to a service on its own machine too."""
    content = photos[0].read_bytes()
    for origin, status in (("http://elsewhere.example", 403), ("null", 403), (api, 200)):
        sent = httpx.post(f"{api}/v1/embed", files={"images": content}, headers={"origin": origin})
        assert sent.status_code == status
        assert httpx.get(f"{api}/v1/actions", headers={"origin": origin}).status_code == 200
    behind_a_proxy = {"origin": "https://own.example", "sec-fetch-site": "same-origin"}
    assert httpx.post(f"{api}/v1/embed", files={"images": content}, headers=behind_a_proxy).status_code == 200


def test_where_no_stream_is(api: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{api.replace('http', 'ws')}/v1/streams", additional_headers={"X-Request-ID": "ours"})
    assert refused.value.response.headers["X-Request-ID"] == "ours"
    assert refused.value.response.status_code == 404
    assert b"no stream /v1/streams" in (refused.value.response.body or b"")
    plain = httpx.get(f"{api}/v1/stream")  # as it comes from a proxy that does not pass the offer on
    assert "a proxy must pass on Upgrade" in problem(plain, 426)
    assert plain.headers["upgrade"] == "websocket"


@pytest.mark.parametrize("start", ["POST /v1/stream HTTP/1.1\r\n", "GET /v1/stream HTTP/1.1\r\n" + "x: x\r\n" * 200])
def test_an_offer_that_cannot_be_read_is_closed(api: str, start: str) -> None:
    with dial(api, 20) as caller:
        caller.sendall(f"{start}Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n".encode())
        while caller.recv(1000):
            pass


@pytest.mark.parametrize("orderly", [True, False], ids=["closed", "broken off"])
def test_what_a_stream_sent_goes_with_it(env: dict[str, str], orderly: bool) -> None:
    frame = bytes(16 * 2**20)
    with serving(env) as (url, process):
        held = []
        for _ in range(12):
            with connect(f"{url.replace('http', 'ws')}/v1/stream") as camera:
                camera.send(frame)
                assert "not an image" in json.loads(camera.recv(60))["error"]
                if not orderly:
                    camera.socket.shutdown(socket.SHUT_RDWR)
            held.append(psutil.Process(process.pid).memory_info().rss)
    assert held[-1] - held[3] < 4 * len(frame)


def test_overload_is_refused_before_it_is_read_and_the_queue_stays_short(
    env: dict[str, str], photos: list[Path]
) -> None:
    content = photos[0].read_bytes()

    async def flood(url: str) -> tuple[Counter[int], list[str]]:
        outcomes: Counter[int] = Counter()
        told: list[str] = []
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64), timeout=120) as client:

            async def ask(i: int) -> None:
                response = await client.post(f"{url}/v1/predict", files={"images": content + str(i).encode()})
                outcomes[response.status_code] += 1
                if response.status_code == 503:
                    told.append(response.headers["retry-after"])

            await asyncio.gather(*(ask(i) for i in range(200)))
        return outcomes, told

    with serving(env, "--queue-size", "8") as (url, _):
        outcomes, told = asyncio.run(flood(url))
        assert set(outcomes) == {200, 503}
        assert outcomes[200] >= 8
        assert all(int(seconds) >= 1 for seconds in told)
        assert "\ncliphar_queue_images 0.0\n" in httpx.get(f"{url}/metrics").text
        assert httpx.post(f"{url}/v1/predict", files={"images": content}).status_code == 200


def test_a_body_that_never_comes_is_given_up(env: dict[str, str]) -> None:
    with serving(env, "--deadline", "1") as (url, _), dial(url) as slow:
        slow.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nab")
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


ENDLESS = {
    "a header": (b"GET / HTTP/1.1\r\nX: ", b"x" * 2**16),
    "headers": (b"GET / HTTP/1.1\r\n", b"x: x\r\n" * 2**14),
    "trailers": (b"POST /v1/embed HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"x: x\r\n" * 2**14),
    "an address": (b"GET /", b"x" * 2**16),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_closed_before_it_takes_memory(api: str, what: str) -> None:
    start, part = ENDLESS[what]
    with dial(api) as endless:
        endless.sendall(start)
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                endless.sendall(part)


def test_what_cannot_be_read_is_a_problem_document_too(api: str) -> None:
    with dial(api) as caller:
        caller.sendall("GET /v1/labels?x=\u00fc HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = caller.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: application/problem+json\r\n" in head
    assert "%-encoded" in json.loads(body)["detail"]


def test_what_comes_by_drops_does_not_keep_its_connection(env: dict[str, str], photos: list[Path]) -> None:
    with serving(env, "--deadline", "1") as (url, _), connect(f"{url.replace('http', 'ws')}/v1/stream") as camera:
        post = HEAD.format("POST /v1/embed", 10**6).encode()
        whole = b"GET /livez HTTP/1.1\r\n\r\n"
        for start, drop in ((b"", b""), (b"GET / HTTP/1.1\r\n", b"x"), (post, b"x"), (whole, b"\r\n")):
            with dial(url, 0.2) as slow:
                end = time.monotonic() + 30
                with suppress(ConnectionError):
                    slow.sendall(start)
                    while time.monotonic() < end:
                        slow.sendall(drop)
                        with suppress(TimeoutError):
                            if not slow.recv(1000):
                                break
                assert time.monotonic() < end
        camera.send(photos[0].read_bytes())  # it is older than any of them
        assert "label" in json.loads(camera.recv(60))


def test_an_answer_that_nobody_reads_is_let_go(env: dict[str, str]) -> None:
    with serving(env, "--deadline", "1") as (url, _):
        path = "/static-offline-docs/swagger-ui-bundle.js"
        whole = 20 * len(httpx.get(f"{url}{path}").content)
        for pause_s, all_came in ((0.05, True), (6, False)):  # before each of the first reads
            with dial(url) as slow:
                slow.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 20)
                came, pauses = 0, 80 if all_came else 1
                with suppress(ConnectionError):
                    while came < whole:
                        if pauses:
                            time.sleep(pause_s)
                            pauses -= 1
                        if not (part := slow.recv(2**18)):
                            break
                        came += len(part)
            assert (came >= whole) == all_came


def test_very_many_values_hold_nobody_up(api: str) -> None:
    many = b"1," * 4_000_000 + b"1"
    tensor = b'{"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES"}], "outputs": ['
    for method, path, body, status in (
        ("POST", "/v1/predict", b'{"images": [' + many + b"]}", 422),
        ("PUT", "/v1/labels/x", b"[" + many + b"]", 422),
        ("PUT", "/v1/labels/x", json.dumps(["a b " * 2_000_000]).encode(), 422),
        ("POST", "/v2/models/mini/infer", tensor + many + b"]}", 400),
        ("POST", "/v2/models/mini/infer", tensor + b'{"name": "label"},' * 500_000 + b'{"name": "label"}]}', 400),
    ):
        began = time.monotonic()
        kind = {"content-type": "application/json"}
        assert problem(httpx.request(method, f"{api}{path}", content=body, headers=kind, timeout=120), status)
        assert time.monotonic() - began < 20  # to list all that is wrong took a minute, and gigabytes


def test_callers_that_hang_up_harm_nobody(api: str, photos: list[Path]) -> None:
    host, port = api.removeprefix("http://").split(":")
    content = photos[0].read_bytes()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
    for part in (content[:100], content[:-1], content):
        for _ in range(5):
            with socket.create_connection((host, int(port))) as rude:
                rude.sendall(head.encode() + part)
    end = time.monotonic() + 60
    while "\ncliphar_queue_images 0.0\n" not in httpx.get(f"{api}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.05)
    with Client(api) as client:
        assert isinstance(client.predict(photos[:1])[0], Prediction)


def test_what_a_caller_that_hangs_up_sent_leaves_memory_at_once(tmp_path: Path) -> None:
    told: list[str] = []

    class Part(bytes):
        def __del__(self) -> None:
            told.append("freed")

    async def receive() -> dict[str, Any]:
        if told:
            return {"type": "http.disconnect"}
        told.append("sent")
        return {"type": "http.request", "body": Part(b"x"), "more_body": True}

    async def send(message: MutableMapping[str, Any]) -> None:
        raise AssertionError(message)

    app = create_app(Service.start(Settings(state=tmp_path)))
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b""}
    gc.disable()  # it looks seldom
    try:
        asyncio.run(app(scope | {"headers": [(b"content-type", b"image/jpeg")]}, receive, send))
        assert told == ["sent", "freed"]
    finally:
        gc.enable()


class _Quiet(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class _Collector(_Quiet):
    def do_POST(self) -> None:
        self.server.received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()


def test_traces_go_where_the_variables_say(env: dict[str, str], photos: list[Path]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as collector:
        collector.received = []  # type: ignore[attr-defined]
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        told = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with serving(env | told) as (url, _), Client(url) as client:
            client.predict(photos[:1])
            end = time.monotonic() + 60
            while not collector.received and time.monotonic() < end:  # type: ignore[attr-defined]
                time.sleep(0.05)
        path, spans = collector.received[0]  # type: ignore[attr-defined]
        collector.shutdown()
    assert path == "/v1/traces"
    assert b"POST /v1/predict" in spans
    assert b"cliphar" in spans


class _Busy(_Quiet):
    asked = 0
    said = b'{"timeline": {}}\n'

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        type(self).asked += 1
        self.send_response(503 if self.asked == 1 else 200)
        self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(self.said)


def test_a_clip_is_sent_again_to_a_service_that_reads_others() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{service.server_address[1]}") as client:
            assert list(client.video(b"clip")) == [{"timeline": {}}]
            assert _Busy.asked == 2
            with pytest.raises(ClipharError, match="not as cliphar does"):
                client.predict(b"photo")
            for said, why in (
                (b"<html>", "not as cliphar does"),
                (b'{"progress": {}}\n', "ends before the timeline"),
                (b'{"progress": {}}\n{"timel', "ends before the timeline"),
            ):
                _Busy.said = said
                with pytest.raises(ClipharError, match=why):
                    list(client.video(b"clip"))
        service.shutdown()


class _Foreign(_Quiet):
    asked = 0
    said = b""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        type(self).asked += 1
        if self.said:  # else the connection breaks
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip" if self.said == b"gzip" else "identity")
            self.end_headers()
            self.wfile.write(self.said)

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815


def test_an_answer_that_does_not_come_is_named() -> None:
    async def ask(address: str) -> None:
        async with AsyncClient(address, timeout_s=0.5) as client:
            assert client._http.timeout.pool is None  # of ten thousand calls at once, the last waits for the others
            with pytest.raises(ClipharError, match="Timeout; is"):
                await client.model()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(ask(f"http://127.0.0.1:{silent.getsockname()[1]}"))


def test_what_is_no_answer_of_ours_is_one_line() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Foreign) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{other.server_address[1]}") as client:
            with pytest.raises(ClipharError, match="no answer"):
                client.forget("waving")
            assert _Foreign.asked == 1  # it may have been done, and would not be known the second time
            ask: Callable[[], object]
            wrong = (b'{"models": [], "predictions": [7]}', b'{"models": 7, "predictions": [{"label": "a"}]}')
            for said in (b"null", b"[1]", b"{}", b'{"models": {}, "predictions": 7}', *wrong, b"gzip"):
                _Foreign.said = said
                for ask in (client.model, lambda: client.predict(b"photo"), lambda: [*client.video(b"clip")]):
                    with pytest.raises(ClipharError):
                        ask()
            for said in (b"null", b"<html>"):
                _Foreign.said = said
                for ask in (client.vocabularies, lambda: client.put_vocabulary("mine", ["waving"])):
                    with pytest.raises(ClipharError, match="not as cliphar does"):
                        ask()
        other.shutdown()
    with pytest.raises(UsageError, match="line break"):
        Client("http://127.0.0.1:9", api_key="two\nkeys")


def test_keys_are_changed_while_all_workers_run(env: dict[str, str], tmp_path: Path) -> None:
    file, log = tmp_path / "keys", tmp_path / "log"

    def line(key: str) -> str:
        return f"{key} {hashlib.sha256(key.encode()).hexdigest()}\n"

    file.write_text(line("old"))
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "cliphar", "serve", "--port", "0", "--workers", "2", "--api-keys", str(file)],
            env=env,
            stderr=errors,
        ) as process,
        ExitStack() as end_of_test,
    ):
        end_of_test.callback(process.terminate)
        end = time.monotonic() + 120
        while log.read_text().count('"ready"') < 2 and time.monotonic() < end:
            time.sleep(0.1)
        url = json.loads(log.read_text().partition("\n")[0])["address"]

        def known(key: str) -> set[bool]:  # to each worker: a new connection each time
            asked = [httpx.get(f"{url}/v1/labels", headers={"x-api-key": key}, timeout=60) for _ in range(12)]
            return {answer.status_code == 200 for answer in asked}

        assert (known("old"), known("new")) == ({True}, {False})
        with pytest.raises(InvalidStatus):
            connect(f"ws{url[4:]}/v1/stream")
        with file.open("a") as more:
            more.write(line("new"))
        assert (known("old"), known("new")) == ({True}, {True})
        for damage in (lambda: file.write_text("new, but no digest"), lambda: file.write_text(""), file.unlink):
            damage()
            assert (known("old"), known("new")) == ({True}, {True})
        (tmp_path / "next").write_text(line("new"))
        (tmp_path / "next").rename(file)
        assert (known("old"), known("new")) == ({False}, {True})
    said = [entry["reason"] for entry in map(json.loads, log.read_text().splitlines()) if "old keys" in entry["event"]]
    assert "handshake" not in log.read_text()
    for why in ("without a sha256", "holds no key", "cannot read"):
        assert 1 <= len([reason for reason in said if why in reason]) <= 2  # once a worker


def test_where_nothing_can_be_written(env: dict[str, str], photos: list[Path]) -> None:
    with serving(env | {"CLIPHAR_STATE": "/proc/nowhere"}) as (url, _), Client(url, retry_s=0) as client:
        assert isinstance(client.predict(photos[:1])[0], Prediction)
        assert "CLIPHAR_STATE" in problem(httpx.put(f"{url}/v1/labels/mine", json=["a"]), 500)


def test_workers_agree_and_one_that_dies_is_replaced(env: dict[str, str], photos: list[Path], tmp_path: Path) -> None:
    own = env | {"CLIPHAR_STATE": str(tmp_path)}
    with serving(own, "--workers", "2") as (url, supervisor):

        def pids() -> set[int]:
            found = set()
            for child in psutil.Process(supervisor.pid).children():
                with suppress(psutil.Error):  # one that has just ended
                    if "spawn_main" in str(child.cmdline()):
                        found.add(child.pid)
            return found

        def ask() -> list[str]:
            of: dict[str, list[str]] = httpx.get(f"{url}/v1/labels", timeout=30).json()  # a new connection each time
            return of.get("mine", [])

        def counted() -> float:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            asked = [line for line in lines if "cliphar_requests_total" in line and '"/v1/labels"' in line]
            return sum(float(line.split()[-1]) for line in asked)

        time.sleep(3)  # the second one is on its way
        assert len(pids()) == 2
        assert httpx.put(f"{url}/v1/labels/mine", json=["mowing"], timeout=30).status_code == 200
        assert all(ask() == ["mowing"] for _ in range(10))
        end = time.monotonic() + 60
        while counted() != 10:  # a worker counts a request just after its answer
            assert time.monotonic() < end
            time.sleep(0.1)
        while "\ncliphar_queue_size 256.0\n" not in (text := httpx.get(f"{url}/metrics").text):  # that of both
            assert time.monotonic() < end
            time.sleep(0.1)
        assert re.search(r"\ncliphar_model_info{.*} 1\.0\n", text)
        time.sleep(3)  # for one that ends sooner was not able to start
        dead = pids().pop()
        os.kill(dead, signal.SIGKILL)
        end = time.monotonic() + 60
        while dead in pids() or len(pids()) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        supervisor.send_signal(signal.SIGHUP)  # the new one is not yet able to listen to it
        with Client(url) as client:
            for _ in range(5):
                assert isinstance(client.predict(photos[:1])[0], Prediction)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 0


def test_no_worker_waits_for_a_connection_that_another_has_taken(env: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "cliphar", "serve", "--port", "0", "--workers", "2"]
    with log.open("w") as errors, subprocess.Popen(command, env=env, stderr=errors) as process:
        try:
            end = time.monotonic() + 120
            while log.read_text().count('"ready"') < 2:
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(5)  # for one that ends sooner was not able to start
            [fd] = [known.fd for known in psutil.Process(process.pid).net_connections("tcp")]
            os.kill(json.loads(log.read_text().partition("\n")[0])["pid"], signal.SIGKILL)
            blocking = until = 0.0
            while not until or time.monotonic() < until:
                assert time.monotonic() < end
                for _ in range(1000):  # of the open file that all of them share
                    flags = Path(f"/proc/{process.pid}/fdinfo/{fd}").read_text().partition("flags:")[2].split()[0]
                    blocking += not int(flags, 8) & os.O_NONBLOCK
                if not until and log.read_text().count('"ready"') == 3:
                    until = time.monotonic() + 1
            assert not blocking
        finally:
            process.terminate()


def test_workers_that_stop_take_no_new_connections(env: dict[str, str]) -> None:
    with serving(env, "--workers", "2") as (url, process):
        address = urlsplit(url).hostname, urlsplit(url).port or 0
        with socket.create_connection(address, timeout=60) as slow:
            head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n"
            slow.sendall(head + b"Expect: 100-continue\r\n\r\n")
            assert slow.recv(100).startswith(b"HTTP/1.1 100 ")  # it has come in
            process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 25  # it may take 30
            with pytest.raises(ConnectionRefusedError):
                while time.monotonic() < end:
                    socket.create_connection(address).close()
                    time.sleep(0.1)
            assert process.poll() is None  # for it has a request to answer


def test_no_worker_outlives_a_supervisor_that_is_killed(env: dict[str, str], tmp_path: Path) -> None:
    with serving(env | {"TMPDIR": str(tmp_path)}, "--workers", "2") as (url, process):
        process.kill()
        process.wait(60)
        end = time.monotonic() + 60
        with pytest.raises(ConnectionRefusedError):
            while time.monotonic() < end:
                dial(url).close()
                time.sleep(0.1)


def test_a_log_line_is_one_write(env: dict[str, str]) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # keeps writes apart
    ours.settimeout(60)
    command = [sys.executable, "-m", "cliphar", "serve", "--port", "0"]
    with ours, subprocess.Popen(command, env=env | {"PYTHONUNBUFFERED": "1"}, stderr=its.fileno()) as process:
        its.close()
        try:
            written = ours.recv(65536)
            assert written.endswith(b"\n")
            assert json.loads(written)["event"] == "ready"
            client = httpx.Client()
            client.get(json.loads(written)["address"] + "/livez")
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            client.close()
            assert b'"stopped"' in ours.recv(65536)
        finally:
            process.terminate()


def test_the_runtime_by_flag_and_by_variable(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cliphar", "serve", "--port", "0"]
    for told, flag in (({}, ["--runtime", "abacus"]), ({"CLIPHAR_RUNTIME": "abacus"}, [])):
        done = subprocess.run(
            [*command, *flag], env=env | told, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2
        assert "has no runtime 'abacus' (it has onnx, onnx-int8)" in done.stderr
    with serving(env, "--model", str(packaged("mini")), "--runtime", "onnx-int8") as (url, _):
        assert httpx.get(f"{url}/v1/models").json()["models"][0]["runtime"] == "onnx-int8-cpu"


def test_whom_a_proxy_names_is_counted_if_the_proxy_is_known(env: dict[str, str]) -> None:
    for known, third in (("127.0.0.1", 200), ("192.0.2.1", 429)):
        with serving(env | {"FORWARDED_ALLOW_IPS": known}, "--rate", "2") as (url, _):
            names = ("10.0.0.1", "10.0.0.1", "10.0.0.2")
            told = [httpx.get(f"{url}/v1/models", headers={"X-Forwarded-For": name}).status_code for name in names]
            assert told == [200, 200, third]


def test_workers_that_cannot_start_say_why_once_each(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cliphar", "serve", "--port", "0", "--workers", "2", "--model", "no-such"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no model 'no-such'" in done.stderr
    assert "Traceback" not in done.stderr


def test_mixed_traffic_loses_nothing(clean_env: dict[str, str]) -> None:
    soak = Path(__file__).parents[1] / "benchmarks" / "serving" / "soak.py"
    command = [sys.executable, str(soak), "--requests", "600"]
    done = subprocess.run(command, env=clean_env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["lost_or_wrong"] == 0
