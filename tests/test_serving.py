"""The HTTP API: a real server process on a real socket, asked as its clients ask."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx
import numpy as np
import pytest
import structlog
from fastapi.testclient import TestClient
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from cliphar.bundle import packaged
from cliphar.client import AsyncClient, Client
from cliphar.errors import BundleError, MediaError, UsageError
from cliphar.recognizer import Prediction, Recognizer
from cliphar.serving import Engine, Service, Settings, create_app
from cliphar.serving._keys import Keys
from cliphar.serving._problems import ProblemError
from serving_process import problem, serving

# --- predict


def test_the_service_answers_as_the_recogniser_does(api: str, mini: Recognizer, photos: list[Path]) -> None:
    with Client(api) as client:
        for labels in (None, ["cooking", "taking a photo"], ["cooking"], "Kitchen"):
            local = client.vocabularies()[labels] if isinstance(labels, str) else labels
            expected = mini.predict(photos, local, top_k=3, coverage=0.8)
            found = client.predict(photos, labels, top_k=3, coverage=0.8)
            for one, other in zip(found, expected, strict=True):
                assert isinstance(one, Prediction)
                assert (one.label, one.set) == (other.label, other.set)
                # which photos are in a batch together changes the last digits
                assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)


def test_the_client_asks_nothing_of_no_photos_and_has_no_answer_without_labels(api: str, photos: list[Path]) -> None:
    with Client(api) as client:
        assert client.predict([]) == []
        for ask in (client.predict, lambda photo, labels: list(client.video(photo, labels))):
            with pytest.raises(UsageError, match="no labels"):
                ask(photos[0], [])
        with pytest.raises(UsageError, match="1000 labels are too many; at most 500"):
            client.predict(photos[0], map(str, range(1000)))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="too long for one request; give fewer, or a vocabulary's name"):
            list(client.video(photos[0], [f"waving {number:0150}" for number in range(450)]))


def test_three_kinds_of_body(api: str, photos: list[Path]) -> None:
    content = photos[0].read_bytes()
    encoded = base64.b64encode(content).decode()
    ways = [
        {"files": {"images": content}, "data": {"labels": "sleeping, eating", "top_k": "1"}},
        {"json": {"images": [encoded], "labels": ["sleeping", "eating"], "top_k": 1}},
        {"files": {"images": content}, "params": {"labels": "sleeping, eating", "top_k": 1}},
        {"json": {"images": [encoded]}, "params": {"labels": "sleeping, eating", "top_k": 1}},
        {"json": {"images": [base64.encodebytes(content).decode()], "labels": "sleeping,eating", "top_k": 1}},
        {"json": {"images": [f"data:image/jpeg;base64,{encoded}"], "labels": "sleeping,eating", "top_k": 1}},
        {
            "content": content,
            "headers": {"content-type": "image/jpeg"},
            "params": {"labels": ["sleeping", "eating"], "top_k": 1},
        },
    ]
    answers = [httpx.post(f"{api}/v1/predict", **way).json() for way in ways]  # type: ignore[arg-type]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]["predictions"][0]["top"]) == 1


def test_an_offer_of_http2_is_let_pass(api: str, photos: list[Path]) -> None:
    """Java's client makes it with every request, as does curl --http2: the body was lost."""
    offer = {"connection": "upgrade, http2-settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
    content, kind = photos[0].read_bytes(), {"content-type": "image/jpeg"}
    known = httpx.post(f"{api}/v1/predict", content=content, headers=kind).json()
    with httpx.Client(headers=offer | kind) as client:  # one connection
        for body in (content, iter([content[:999], content[999:]]), content):
            assert client.post(f"{api}/v1/predict", content=body).json() == known
            assert client.get(f"{api}/livez").status_code == 200


def test_a_bad_photo_does_not_spoil_the_others(api: str, photos: list[Path]) -> None:
    with Client(api) as client:
        good, bad = client.predict([photos[0], b"no photo"])
        assert isinstance(good, Prediction)
        assert isinstance(bad, MediaError)
        assert client.predict(str(photos[0])) == [good]  # one alone
        (alone,) = client.predict([b"no photo"])
        assert isinstance(alone, MediaError) and str(alone) == str(bad)
        vector, unread = client.embed([photos[0], b"no photo"])
        assert isinstance(vector, np.ndarray) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert isinstance(unread, MediaError) and str(unread) == str(alone)
        assert [str(one) for one in client.embed(b"no photo")] == [str(bad)]
        with pytest.raises(UsageError, match="cannot be a label"):
            client.predict([b"no photo"], "unknown")


def test_a_client_takes_any_number_of_photos(api: str, photos: list[Path]) -> None:
    """More than one request may bring; those that cannot be read where the client is are answered in their place."""
    with Client(api) as client, photos[0].open("rb") as opened:
        few: list[Any] = [photos[0], "nowhere.jpg", opened, b"no photo", photos[1]]
        answers = client.predict(few[i % 5] for i in range(200))
        assert len(answers) == 200
        said = [getattr(one, "label", str(one)) for one in answers]
        assert said == said[:5] * 40
        assert [isinstance(one, MediaError) for one in answers[:5]] == [False, True, True, True, False]
        assert "give encoded bytes or a path" in str(client.predict(opened)[0])
        assert "No such file" in str(client.predict(["nowhere.jpg"])[0])
        with pytest.raises(UsageError, match="no photos to teach"):
            client.teach("waving", [])

    async def many() -> list[Any]:
        async with AsyncClient(api) as client:
            assert [isinstance(one, MediaError) for one in await client.embed(few)] == [False, True, True, True, False]
            return [*await client.predict(few[i % 5] for i in range(200)), *await client.predict(["nowhere.jpg"])]

    again = asyncio.run(many())
    assert [getattr(one, "label", str(one)) for one in again] == [*said, said[1]]


def test_a_service_that_takes_less_is_sent_less(clean_env: dict[str, str], photos: list[Path]) -> None:
    several: list[Any] = [*photos[:3], "nowhere.jpg", bytes(2**20), photos[0]]

    async def ask(url: str) -> list[Any]:
        async with AsyncClient(url) as client:
            return await client.predict(several)

    with serving(clean_env, "--max-images", "2", "--max-body", "1") as (url, _), Client(url) as client:
        answers = client.predict(several)
        again = asyncio.run(ask(url))
    assert [isinstance(one, Prediction) for one in answers] == [True, True, True, False, False, True]
    assert answers[5] == answers[0] and "over 1 MB" in str(answers[4])
    assert [str(one) for one in again] == [str(one) for one in answers]


BAD = {
    "no images": {"files": {"other": b"x"}},
    "a misspelt field": {"files": {"images": b"x"}, "data": {"label": "cooking"}},
    "a misspelt field of the query": {"files": {"images": b"x"}, "params": {"label": "cooking"}},
    "the name of a file": {"files": {"images": (None, "photo.jpg")}},
    "not JSON": {"content": b"{", "headers": {"content-type": "application/json"}},
    "an unknown key": {"json": {"images": ["aaaa"], "colour": "red"}},
    "not base64": {"json": {"images": ["%"]}},
    "no labels": {"json": {"images": ["aaaa"], "labels": []}},
    "top_k": {"content": b"x", "headers": {"content-type": "image/png"}, "params": {"top_k": "0"}},
    "coverage": {"content": b"x", "headers": {"content-type": "image/png"}, "params": {"coverage": "nan"}},
    "half a surrogate pair": {
        "content": rb'{"images": ["aaaa"], "labels": ["\ud800", "sleeping"]}',
        "headers": {"content-type": "application/json"},
    },
    "too deep": {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
    "a reserved label": {"json": {"images": ["aaaa"], "labels": ["unknown"]}},
    "an empty body": {"content": b"", "headers": {"content-type": "image/png"}},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_a_wrong_request_is_a_problem_document(api: str, body: dict[str, Any]) -> None:
    assert problem(httpx.post(f"{api}/v1/predict", **body), 422)


def test_other_refusals(api: str) -> None:
    text = {"content-type": "text/plain"}
    assert "multipart" in problem(httpx.post(f"{api}/v1/predict", content=b"x", headers=text), 415)
    packed = {"content-type": "image/jpeg", "content-encoding": "gzip"}
    assert "without compression" in problem(httpx.post(f"{api}/v1/predict", content=b"x", headers=packed), 415)
    as_form = {"content-type": "application/x-www-form-urlencoded"}  # as curl -d says
    assert "application/json" in problem(httpx.put(f"{api}/v1/labels/x", content=b'["a"]', headers=as_form), 415)
    assert problem(httpx.get(f"{api}/nowhere"), 404)
    assert "use POST; see" in problem(httpx.get(f"{api}/v1/predict"), 405)
    assert (wrong := httpx.post(f"{api}/v1/labels/x")).headers["allow"] == "GET, PUT, DELETE"
    assert "does not take POST; use GET, PUT, DELETE" in problem(wrong, 405)
    assert problem(httpx.get(f"{api}/v1/labels/none such"), 404)
    image = {"content-type": "image/png"}
    assert "64 MB" in problem(httpx.post(f"{api}/v1/predict", content=bytes(65 * 2**20), headers=image), 413)
    many = [("images", (str(i), b"x")) for i in range(65)]
    assert problem(httpx.post(f"{api}/v1/predict", files=many), 413)
    misspelt = httpx.post(f"{api}/v1/actions/waving", files={"image": b"x"})
    assert "did you mean 'images'?" in problem(misspelt, 422)
    beside = httpx.post(f"{api}/v1/predict", files=[("images", b"x"), ("images", (None, "photo.jpg"))])
    assert "one that is no file" in problem(beside, 422)
    as_file = httpx.post(f"{api}/v1/predict", files={"images": b"x", "labels": b"cooking"})
    assert "labels came as a file" in problem(as_file, 422)


# --- earlier clients


def test_earlier_clients_are_answered(api: str, photos: list[Path]) -> None:
    assert httpx.get(f"{api}/").json()["name"] == "cliphar"
    assert httpx.get(f"{api}/health").json()["status"] == "healthy"
    content = photos[0].read_bytes()
    one = httpx.post(f"{api}/predict", json={"image_data": base64.b64encode(content).decode(), "top_k": 3}).json()
    two = httpx.post(f"{api}/predict/image", files={"file": content}, params={"top_k": 3}).json()
    assert one["predictions"] == two["predictions"]
    assert [row["rank"] for row in one["predictions"]] == [1, 2, 3]
    assert set(one["predictions"][0]) == {"rank", "class_id", "class_name", "score"}
    assert one["model_name"] == "mini"
    assert one["inference_time"] > 0
    assert "switched off" in problem(httpx.post(f"{api}/predict", json={"image_url": "http://example.org/a.jpg"}), 403)
    asked = {"images": ["https://example.org/a.jpg"]}
    assert "switched off" in problem(httpx.post(f"{api}/v1/predict", json=asked), 403)
    assert problem(httpx.post(f"{api}/predict", json={}), 422)


# --- what a service is told and taught


def test_a_model_tells_of_itself(api: str) -> None:
    with Client(api) as client:
        told = client.model_card(client.model()["name"])
        assert told["card"].startswith("# mini")
        assert told["evaluation"] is None
        with pytest.raises(UsageError, match="there is: mini"):
            client.model_card("maxi")


def test_vocabularies_and_actions_are_kept(api: str, photos: list[Path], samples: Path) -> None:
    with Client(api) as client:
        for given in (["mowing the lawn", "posing for a portrait"], "mowing the lawn, posing for a portrait"):
            client.put_vocabulary("mine", given)
            assert client.vocabularies()["mine"] == ["mowing the lawn", "posing for a portrait"]
        with pytest.raises(UsageError, match="a name without commas"):
            client.put_vocabulary("cooking,eating", ["mowing the lawn"])  # others ask for these two labels
        lesson = client.teach("being a cat", [samples / "cat.jpg"])
        assert lesson["photos"] == 1
        assert client.model()["taught"] == {"being a cat": 1}
        (answer,) = client.predict([samples / "cat.jpg"], top_k=16)
        assert isinstance(answer, Prediction)
        assert "being a cat" in [label for label, _ in answer.top]
        client.forget("being a cat")
        assert "being a cat" not in client.model()["labels"]
        client.delete_vocabulary("mine")
    assert problem(httpx.delete(f"{api}/v1/labels/mine"), 404)
    assert problem(httpx.put(f"{api}/v1/labels/%20", json=["a"]), 422)


def test_a_name_that_no_path_leads_to_is_refused_by_the_client(api: str, photos: list[Path]) -> None:
    with Client(api) as client:
        client.put_vocabulary("caf\u00e9 #1?", ["waving"])
        assert client.vocabularies()["caf\u00e9 #1?"] == ["waving"]
        for name in ("lifting/carrying", "..", " "):
            with pytest.raises(UsageError, match="cannot be a name here"):
                client.teach(name, photos)
            with pytest.raises(UsageError, match="cannot be a name here"):
                client.put_vocabulary(name, ["waving"])


def test_what_was_taught_outlives_the_service(clean_env: dict[str, str], samples: Path, tmp_path: Path) -> None:
    env = clean_env | {"CLIPHAR_STATE": str(tmp_path / "state")}
    with serving(env) as (url, _), Client(url) as client:
        client.teach("being a cat", [samples / "cat.jpg"])
    with serving(env) as (url, _), Client(url) as client:
        assert client.model()["taught"] == {"being a cat": 1}
        (taught,) = (tmp_path / "state").glob("taught-*")
        taught.write_bytes(b"cut short")
        refused = problem(httpx.delete(f"{url}/v1/actions/being%20a%20cat"), 500)
    assert refused.startswith(f"cannot read taught actions from {taught.name}: ")
    assert str(tmp_path) not in refused


# --- operations


def test_operations(api: str, samples: Path) -> None:
    assert httpx.get(f"{api}/livez").json() == {"status": "alive"}
    assert httpx.get(f"{api}/readyz").json() == {"status": "ready"}
    for path in ("/livez", "/v1/models"):
        asked = httpx.head(f"{api}{path}")
        assert (asked.status_code, asked.content, int(asked.headers["content-length"]) > 0) == (200, b"", True)
    with Client(api) as client:
        client.predict([samples / "cat.jpg"])
        client.predict([samples / "cat.jpg"])
    text = httpx.get(f"{api}/metrics").text
    for name in ("cliphar_requests_total", "cliphar_batch_images_count", "cliphar_queue_images", "cliphar_model_info"):
        assert f"\n{name}" in text
    for stage in ("queue", "decode", "model"):
        assert f'\ncliphar_stage_seconds_count{{stage="{stage}"}} ' in text
    assert "\ncliphar_queue_size 256.0\n" in text
    assert "\ncliphar_kept_images_total 0.0\n" not in text
    assert "\ncliphar_batch_images_count 0.0\n" not in text
    headers = httpx.get(f"{api}/v1/models", headers={"x-request-id": "abc"}).headers
    assert (headers["x-request-id"], headers["x-content-type-options"]) == ("abc", "nosniff")


def test_sigterm_answers_what_came_in(clean_env: dict[str, str], photos: list[Path]) -> None:
    content = photos[0].read_bytes()
    ask = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content) + 1}\r\n"
    with serving(clean_env) as (url, process), ExitStack() as stack:
        address = urlsplit(url)
        place = (address.hostname, address.port or 0)
        callers = [stack.enter_context(socket.create_connection(place, timeout=60)) for _ in range(16)]
        for caller in callers:
            caller.sendall(f"{ask}Expect: 100-continue\r\n\r\n".encode())
        for caller in callers:  # it has come in before the signal
            assert caller.recv(100).startswith(b"HTTP/1.1 100 ")
        for i, caller in enumerate(callers):
            caller.sendall(content + bytes([i]))  # else they would be computed once
        process.send_signal(signal.SIGTERM)
        for caller in callers:
            head, _, body = caller.recv(10_000).partition(b"\r\n\r\n")  # in one packet
            assert head.startswith(b"HTTP/1.1 200 ") and b'"predictions"' in body
        assert process.wait(60) == 0


def test_keys_and_rates(clean_env: dict[str, str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    # a key and the one that takes its place
    keys.write_text("\ufeff# a\n" + "".join(f"anna {hashlib.sha256(key).hexdigest()}\n" for key in (b"secret", b"new")))
    with keys.open("a") as more:
        more.write(f"zoë {hashlib.sha256('schlüssel'.encode()).hexdigest().upper()}\n")  # as PowerShell has it
    page = {"origin": "http://page.example", "access-control-request-method": "GET"}
    with serving(clean_env, "--api-keys", str(keys), "--rate", "3", "--cors", "http://Page.example/") as (url, _):
        assert httpx.get(f"{url}/livez").status_code == 200
        asked = httpx.options(f"{url}/v1/models", headers=page | {"access-control-request-headers": "x-api-key"})
        assert (asked.status_code, asked.headers["access-control-allow-headers"]) == (200, "x-api-key")
        assert "key" in problem(httpx.get(f"{url}/v1/models"), 401)
        assert "swagger" in httpx.get(f"{url}/docs").text  # a browser has no key before it sees where to give one
        document = httpx.get(f"{url}/openapi.json").json()
        assert document["security"] == [{"key": []}]
        assert document["paths"]["/livez"]["get"]["security"] == []
        assert problem(httpx.get(f"{url}/v1/models", headers={"x-api-key": "wrong"}), 401)
        for key in ("secret\n", "schlüssel"):  # the first as it is read from a file
            with Client(url, api_key=key) as client:
                assert client.model()["name"] == "mini"
        assert problem(httpx.get(f"{url}/v1/models", headers=[(b"x-api-key", b"schl\xfcssel")]), 401)
        for key in ("secret", "new"):
            assert httpx.get(f"{url}/v1/models", headers={"x-api-key": key}).status_code == 200
        refused = httpx.get(f"{url}/v1/models", headers=page | {"x-api-key": "secret"})
        assert problem(refused, 429)
        assert "Retry-After" in refused.headers["access-control-expose-headers"]  # else the page could not read it
        assert int(refused.headers["retry-after"]) >= 1


def test_bodies_in_chunks_take_the_room_that_they_need(clean_env: dict[str, str], photos: list[Path]) -> None:
    with serving(clean_env, "--max-body", "1") as (url, _), ExitStack() as stack:
        for _ in range(8):
            one = stack.enter_context(socket.create_connection((urlsplit(url).hostname, urlsplit(url).port or 0)))
            one.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n")
            one.sendall(b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        with Client(url, retry_s=0) as client:
            assert isinstance(client.predict(photos[:1])[0], Prediction)
        chunks, kind = (bytes(2**16) for _ in range(20)), {"content-type": "application/json"}
        assert problem(httpx.put(f"{url}/v1/labels/x", content=chunks, headers=kind), 413)


def test_who_asks_too_often_is_still_answered_at_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keys, answered = Keys(None, 60), [0, 0]
    for turn, pause in enumerate((0.5, 0)):  # two a second; and after an hour's rest all at once
        for _ in range(240):
            now += pause
            with suppress(ProblemError):
                keys.check(None, None, "10.0.0.1")
                answered[turn] += 1
        now += 3600
    assert answered == [60 + 119, 60]
    keys = Keys(None, 2)
    for caller in ("10.0.0.1", "10.0.0.1", *map(str, range(20_000))):
        keys.check(None, None, caller)
        if caller != "10.0.0.1":
            with pytest.raises(ProblemError) as refused:  # who asks on is not forgotten among the many
                keys.check(None, None, "10.0.0.1")
    assert (refused.value.headers or {})["Retry-After"] == "30"
    assert len(keys._tokens) == 10_000
    keys.check(None, None, "19999")
    with pytest.raises(ProblemError):
        keys.check(None, None, "19999")


def test_a_taken_port_is_one_line(clean_env: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "cliphar", "serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, env=clean_env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "choose another" in done.stderr


def test_the_async_client(api: str, photos: list[Path]) -> None:
    async def ask() -> None:
        async with AsyncClient(api) as client:
            answers = await asyncio.gather(*(client.predict([photo]) for photo in photos))
            assert all(isinstance(answer[0], Prediction) for answer in answers)
            assert (await client.model())["name"] == "mini"

    asyncio.run(ask())


def test_a_service_that_is_not_there(clean_env: dict[str, str]) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Exception, match="is 'cliphar serve' running"):
        client.model()
    for wrong in ("127.0.0.1:9", "http://", "http://[::1"):
        with pytest.raises(UsageError, match="like http://"):
            Client(wrong)


def test_a_service_that_is_elsewhere_by_now(tmp_path: Path) -> None:
    (tmp_path / "v1" / "models").mkdir(parents=True)  # Python's server sends on to what ends in a slash
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as moved:
        threading.Thread(target=moved.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{moved.server_address[1]}"
        with Client(address) as client, pytest.raises(UsageError, match="sends on to /v1/models/; give that address"):
            client.model()
        moved.shutdown()


# --- the engine


def engine(encode: Callable[[Any], Any], prepare: Callable[[bytes], Any] | None = None, **changes: Any) -> Engine:
    options: dict[str, Any] = {"queue_size": 100, "max_batch": 8, "decoders": 2}
    return Engine(prepare or (lambda content: np.full((2, 2, 3), content[0], np.uint8)), encode, **(options | changes))


def means(squares: Any) -> Any:
    return squares.mean((1, 2)).astype(np.float32)


def test_the_same_photo_at_once_is_computed_once() -> None:
    batches: list[int] = []

    def encode(squares: Any) -> Any:
        batches.append(len(squares))
        return means(squares)

    async def ask() -> None:
        one = engine(encode)
        found = await asyncio.gather(*(one.embed([b"\x07"], 5) for _ in range(20)))
        assert all(np.asarray(vectors[0])[0] == 7 for vectors in found)
        assert one.pending == 0
        one.close()

    asyncio.run(ask())
    assert sum(batches) == 1


def test_a_photo_asked_for_again_is_not_computed_again() -> None:
    seen: list[int] = []
    told: list[str] = []

    def encode(squares: Any) -> Any:
        seen.extend(int(square[0, 0, 0]) for square in squares)
        return means(squares)

    def prepare(content: bytes) -> Any:
        if content == b"bad":
            raise MediaError("it is bad")
        return np.full((2, 2, 3), content[0], np.uint8)

    async def ask() -> None:
        one = engine(encode, prepare, keep=2, max_batch=1, queue_size=2, observe=lambda stage, _: told.append(stage))
        await one.embed([b"\x01", b"\x02"], 5)
        for _ in range(2):
            found = await one.embed([b"\x02", b"\x01", b"\x01"], 5)  # more than the queue has room for
            assert [int(vector[0]) for vector in found if not isinstance(vector, MediaError)] == [2, 1, 1]
        await one.embed([b"\x03"], 5, again=False)
        await one.embed([b"\x03"], 5)  # takes the place of 2, which was used before 1
        assert isinstance((await one.embed([b"bad"], 5))[0], MediaError)
        await one.embed([b"\x01", b"\x02"], 5)
        assert one.pending == 0
        one.close()

    asyncio.run(ask())
    assert seen == [1, 2, 3, 3, 2]
    assert told.count("kept") == 7


def test_new_words_are_under_the_deadline_and_wait_for_no_teaching(photos: list[Path], tmp_path: Path) -> None:
    async def ask() -> None:
        service = Service.start(Settings(state=tmp_path, deadline_s=30))
        contents = [photos[0].read_bytes()]
        await service.answer(contents, ["standing", "sitting"], 5, 0.9)
        words = [f"holding {i} things" for i in range(40)]  # what comes after waits until they are embedded
        slow = replace(service, settings=service.settings.model_copy(update={"deadline_s": 0.001}))
        with pytest.raises(ProblemError, match="no answer within"):
            await slow.answer(contents, words, 5, 0.9)
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker is taught
            put = service.state.put_vocabulary
            waiting = [asyncio.create_task(service.change(put, "mine", ("waving",))) for _ in range(40)]
            await asyncio.sleep(0.1)
            await service.answer(contents, ["standing", "lying"], 5, 0.9)
        await asyncio.gather(*waiting)
        service.engine.close()

    asyncio.run(ask())


def test_batches_grow_with_the_load_and_a_single_photo_is_not_behind_a_hundred() -> None:
    batches: list[list[int]] = []
    prepared: list[int] = []
    gate = threading.Event()

    def prepare(content: bytes) -> Any:
        prepared.append(content[0])
        return np.full((2, 2, 3), content[0], np.uint8)

    def encode(squares: Any) -> Any:
        gate.wait(60)
        batches.append([int(square[0, 0, 0]) for square in squares])
        return means(squares)

    async def ask() -> None:
        one = engine(encode, prepare)
        many = asyncio.create_task(one.embed([bytes([i]) for i in range(1, 60)], 60))
        await asyncio.sleep(0.2)
        single = asyncio.create_task(one.embed([b"\xff"], 60))
        while len(prepared) < 60:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        gate.set()
        await asyncio.gather(many, single)
        one.close()

    asyncio.run(ask())
    assert max(map(len, batches)) == 8
    assert 255 in [number for batch in batches[:3] for number in batch]


def test_lanes_run_beside_each_other_and_a_lone_photo_has_all_of_them() -> None:
    runs: list[str] = []

    def encode_lane(squares: Any) -> Any:
        runs.append("begins")
        time.sleep(0.1)
        runs.append("ends")
        return means(squares)

    def encode(squares: Any) -> Any:
        runs.append("alone")
        return means(squares)

    async def ask() -> None:
        one = engine(encode, encode_lane=encode_lane, lanes=2, max_batch=1)
        await one.embed([b"\x01"], 60)
        many = asyncio.create_task(one.embed([bytes([i]) for i in range(2, 32)], 60))
        await asyncio.sleep(1)
        assert one.drain_s < 0.08 * one.pending  # what both lanes spend is counted once
        assert [int(vector[0]) for vector in await many if not isinstance(vector, MediaError)] == [*range(2, 32)]
        one.close()

    asyncio.run(ask())
    assert runs[:3] == ["alone", "begins", "begins"]


def test_past_capacity_the_answer_is_no_at_once() -> None:
    gate = threading.Event()

    def encode(squares: Any) -> Any:
        gate.wait(60)
        return means(squares)

    async def ask() -> None:
        one = engine(encode, queue_size=4)
        waiting = asyncio.create_task(one.embed([b"\x01", b"\x02", b"\x03"], 10))
        await asyncio.sleep(0.05)
        with pytest.raises(ProblemError) as refused:
            await one.embed([b"\x04", b"\x05"], 10)
        assert (refused.value.status_code, "Retry-After" in (refused.value.headers or {})) == (503, True)
        one.check_room(1, 10)
        with pytest.raises(ProblemError, match="queue is full"):
            one.check_room(1, 0.01)  # it would be worked off too late
        gate.set()
        assert len(await waiting) == 3
        assert len(await one.embed([b"\x04", b"\x05"], 10)) == 2
        assert len(await one.embed([bytes([i]) for i in range(9)], 10)) == 9  # all that a request may hold, if alone
        one.close()
        with pytest.raises(ProblemError, match="just been changed"):
            await one.embed([b"\x01"], 10)

    asyncio.run(ask())


def test_a_caller_that_goes_away_costs_no_inference() -> None:
    seen: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def encode(squares: Any) -> Any:
        begun.set()
        gate.wait(60)
        seen.extend(int(square[0, 0, 0]) for square in squares)
        return means(squares)

    async def ask() -> None:
        one = engine(encode, max_batch=1)
        first = asyncio.create_task(one.embed([b"\x01"], 60))
        await asyncio.to_thread(begun.wait, 60)
        gone = asyncio.create_task(one.embed([b"\x02"], 60))
        last = asyncio.create_task(one.embed([b"\x03"], 60))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(first, last)
        assert one.pending == 0
        one.close()

    asyncio.run(ask())
    assert seen == [1, 3]


def test_a_deadline_and_a_failing_model() -> None:
    gate = threading.Event()

    def encode(squares: Any) -> Any:
        gate.wait(60)
        raise RuntimeError("out of memory")

    async def ask() -> None:
        one = engine(encode)
        with pytest.raises(ProblemError, match="no answer within"):
            await one.embed([b"\x01"], 0.05)
        gate.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            await one.embed([b"\x02"], 5)
        assert one.pending == 0
        one.close()

    asyncio.run(ask())


# --- a camera's frames


def test_a_stream_answers_about_the_newest_frame(api: str, mini: Recognizer, photos: list[Path]) -> None:
    address = f"{api.replace('http', 'ws')}/v1/stream?labels=sleeping,taking%20a%20photo"
    content = photos[0].read_bytes()
    with connect(address) as camera:
        camera.send(content)
        first = json.loads(camera.recv(60))
        (expected,) = mini.predict([content], ["sleeping", "taking a photo"])
        assert first["frame"] == 0
        assert {key: first[key] for key in expected.to_dict()} == expected.to_dict()
        for i in range(40):
            camera.send(content + bytes([i]))
        numbers = list[int]()
        while not numbers or numbers[-1] < 40:
            numbers.append(json.loads(camera.recv(60))["frame"])
        assert numbers == sorted(numbers)
        assert len(numbers) < 40  # older ones were dropped
        camera.send(b"no photo")
        assert "not an image" in json.loads(camera.recv(60))["error"]
        camera.send(content)
        assert "label" in json.loads(camera.recv(60))
        camera.send("text")
        with pytest.raises(ConnectionClosed):
            camera.recv(60)


def test_a_stream_is_steady(api: str, photos: list[Path]) -> None:
    with connect(f"{api.replace('http', 'ws')}/v1/stream") as camera:
        answers = []
        for photo in (photos[0], photos[1]):
            camera.send(photo.read_bytes())
            answers.append(json.loads(camera.recv(60)))
        assert answers[0]["label"] == answers[1]["label"]  # one other frame is not yet another action


def test_a_stream_is_refused(api: str, photos: list[Path]) -> None:
    address = f"{api.replace('http', 'ws')}/v1/stream"
    for origin in ("http://elsewhere.example", "http://[::1", "null"):
        with pytest.raises(InvalidStatus) as refused:
            connect(address, additional_headers={"Origin": origin})
        assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{address}?top_k=0")
    assert refused.value.response.status_code == 422
    assert b"query.top_k" in (refused.value.response.body or b"")
    many = quote(",".join(f"{'very ' * 35}long label {i}" for i in range(45)))  # over 8 KiB
    with connect(f"{address}?labels={many}") as camera:
        camera.send(b"no photo")
        assert "not an image" in json.loads(camera.recv(60))["error"]
    with connect(f"{address}?labels=a+cat%2C+at+home&labels=") as camera:  # one label
        camera.send(photos[0].read_bytes())
        assert json.loads(camera.recv(60))["set"] == ["a cat, at home"]
    with connect(f"{address}?label=x") as camera:
        assert "did you mean 'labels'?" in json.loads(camera.recv(60))["error"]
    with connect(f"{address}?labels=unknown") as camera:
        assert "cannot be a label" in json.loads(camera.recv(60))["error"]
    end = time.monotonic() + 10
    for route, status in (("unknown", 403), ("/v1/stream", 422), ("/v1/stream", 101)):  # counted, and so logged
        line = f'\ncliphar_requests_total{{method="WS",route="{route}",status="{status}"}}'
        while line not in httpx.get(f"{api}/metrics").text:
            assert time.monotonic() < end


def test_a_frame_on_which_the_service_fails_does_not_end_the_stream(tmp_path: Path) -> None:
    def fail(_squares: Any) -> Any:
        raise RuntimeError("out of memory")

    service = replace(Service.start(Settings(state=tmp_path)), engine=engine(fail))
    with TestClient(create_app(service)) as client, client.websocket_connect("/v1/stream") as camera:
        for _ in range(2):
            camera.send_bytes(b"frame")
            assert "its log says more" in camera.receive_json()["error"]


def test_a_model_that_no_longer_runs_is_told_in_the_log(tmp_path: Path, photos: list[Path]) -> None:
    def fail(_squares: Any) -> Any:
        raise BundleError("image.onnx of bundle 'mini' does not run here: out of memory")

    service = replace(Service.start(Settings(state=tmp_path)), engine=engine(fail))
    with TestClient(create_app(service)) as client, structlog.testing.capture_logs() as logs:
        problem(client.post("/v1/predict", files={"images": photos[0].read_bytes()}), 500)
        with client.websocket_connect("/v1/stream") as camera:
            camera.send_bytes(photos[0].read_bytes())
            assert "its log says more" in camera.receive_json()["error"]
    assert [log["log_level"] for log in logs if log["event"] == "failed"] == ["error"] * 2


def test_a_large_photo_needs_no_place_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", None)  # as in a read-only container
    photo = io.BytesIO()
    Image.effect_noise((1500, 1500), 100).save(photo, "PNG")
    with TestClient(create_app(Service.start(Settings(state=tmp_path)))) as client:
        response = client.post("/v1/predict", files={"images": photo.getvalue()})
    assert len(photo.getvalue()) > 2**20
    assert response.json()["predictions"][0]["label"]


def test_bounds_that_are_raised_hold(photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own, as of a photo of 200 million
    with TestClient(create_app(Service.start(Settings(state=tmp_path, max_images=1001)))) as client:
        photo = photos[0].read_bytes()
        assert client.post("/v1/predict", content=photo, headers={"Content-Type": "image/jpeg"}).status_code == 200
        form = [("images", ("photo", b"none"))] * 1001
        assert len(client.post("/v1/predict", files=form).json()["predictions"]) == 1001
        assert client.post("/v1/predict", files=form + form[:1]).status_code == 413


# --- video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    av = pytest.importorskip("av")
    target = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(target), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for name in ("cat", "photographer"):
            frame = av.VideoFrame.from_image(Image.open(packaged("samples") / f"{name}.jpg").resize((320, 240)))
            for _ in range(30):
                file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target.read_bytes()


def test_a_clip_is_answered_in_lines(api: str, clip: bytes) -> None:
    ways: list[dict[str, Any]] = [
        {"files": {"video": clip}},
        {"content": clip, "headers": {"content-type": "video/mp4"}},
    ]
    timelines = []
    for way in ways:
        answer = httpx.post(f"{api}/v1/video", params={"labels": "being a cat, taking a photo"}, **way, timeout=60)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert "progress" in lines[0]
        timelines.append(lines[-1]["timeline"])
        assert [line["segment"] for line in lines if "segment" in line] == timelines[-1]["segments"]
    assert timelines[0] == timelines[1]
    assert timelines[0]["duration_s"] == pytest.approx(6, abs=0.3)
    with Client(api) as client:  # words in a string are words, not their letters
        assert list(client.video(clip, "being a cat, taking a photo"))[-1]["timeline"] == timelines[0]
        told = list(client.video(clip, ["being a cat, at home", "taking a photo"]))[-1]["timeline"]
        assert {label for one in told["segments"] for label in one["set"]} == {"being a cat, at home", "taking a photo"}
        told = list(client.video(clip, ["taking a photo"], multi_label=True, fps=1))[-1]["timeline"]
        assert (told["frames"], "unknown" in str(told)) == (round(told["duration_s"]), False)
        assert "unknown" in str(list(client.video(clip, ["mowing the lawn"], fps=1)))


def test_what_is_no_clip_is_refused(api: str, clip: bytes) -> None:
    kind = {"content-type": "video/mp4"}
    assert problem(httpx.post(f"{api}/v1/video", content=b"no clip", headers=kind), 422)
    assert problem(httpx.post(f"{api}/v1/video", content=b"", headers=kind), 422)
    assert problem(httpx.post(f"{api}/v1/video", files={"other": clip}), 422)
    assert problem(httpx.post(f"{api}/v1/video", files={"video": clip}, data={"labels": "cooking"}), 422)
    assert problem(httpx.post(f"{api}/v1/video", json={}), 415)
    assert problem(httpx.post(f"{api}/v1/video", content=clip, headers=kind, params={"fps": 0}), 422)
    assert "'labels'?" in problem(httpx.post(f"{api}/v1/video?label=x", content=clip, headers=kind), 422)


def test_clips_that_come_at_once_are_refused_not_kept_waiting(api: str, samples: Path) -> None:
    film = io.BytesIO()
    frames = [Image.open(samples / "cat.jpg").convert("RGB").resize((640, 480)).rotate(turn) for turn in range(40)]
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:], duration=1000)

    async def ask() -> list[int]:
        kind = {"content-type": "video/gif"}
        async with httpx.AsyncClient(timeout=120) as client:
            asked = (client.post(f"{api}/v1/video?fps=20", content=film.getvalue(), headers=kind) for _ in range(6))
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    for _ in range(2):  # and the places are free afterwards
        assert sorted(asyncio.run(ask())) == [200] * 2 + [503] * 4


def test_the_documentation_needs_no_other_site(api: str) -> None:
    found = httpx.get(f"{api}/docs").text
    parts = re.findall(r'(?:src|href)="([^"]+)"', found)
    assert parts
    for part in parts:
        assert httpx.get(urljoin(f"{api}/docs", part)).status_code == 200
        assert urlsplit(urljoin(api, part)).netloc == urlsplit(api).netloc
