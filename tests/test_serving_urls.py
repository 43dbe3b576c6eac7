"""Images by address: what is fetched, and what is not."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from cliphar.serving import Settings, _urls
from cliphar.serving._problems import ProblemError
from cliphar.serving._urls import Budget, fetch_image, is_public
from serving_process import problem, serving

PRIVATE = [
    "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",  # noqa: S104
    "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1",
    "ff0e::1",
]  # fmt: skip


def test_which_addresses_are_public() -> None:
    public = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]
    assert [address for address in PRIVATE + public if is_public(address)] == public


class _Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = bytes(2 * 2**20) if self.path == "/large" else b"photo of " + self.headers["Host"].encode()
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", "/photo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


def fetch(url: str, budget: Budget | None = None, *, image_urls: bool = True) -> bytes:
    return asyncio.run(fetch_image(url, Settings(image_urls=image_urls), budget or Budget(1)))


def test_what_is_refused(site: str) -> None:
    for url, status in (
        (f"http://{site}/photo", 403),
        ("http://[::1]/photo", 403),
        ("http://2130706433/photo", 403),  # 127.0.0.1
        ("ftp://example.org/photo", 422),
        ("http://me:secret@example.org/photo", 422),
        ("http://@example.org/photo", 422),
        ("http://[nonsense/photo", 422),
        ("http://example.org:99999/photo", 422),
        ("file:///etc/passwd", 422),
        ("http://m\u00fcnchen.invalid/photo", 422),
    ):
        with pytest.raises(ProblemError) as refused:
            fetch(url)
        assert refused.value.status_code == status, url
    with pytest.raises(ProblemError, match="switched off"):
        fetch(f"http://{site}/photo", image_urls=False)


def test_what_is_fetched(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_urls, "is_public", lambda address: True)  # there is no public address to ask here
    assert fetch(f"http://{site}/photo") == b"photo of " + site.encode()
    with pytest.raises(ProblemError, match="answered 302"):
        fetch(f"http://{site}/moved")
    with pytest.raises(ProblemError, match="over 1 MB"):
        fetch(f"http://{site}/large")
    budget = Budget(1)
    budget.take(2**20 - 20)  # by another image of the same request
    with pytest.raises(ProblemError, match="over 1 MB in all"):
        fetch(f"http://{site}/photo", budget)


def test_one_address_that_gives_nothing_does_not_cost_the_others(clean_env: dict[str, str], photos: list[Path]) -> None:
    photo = base64.b64encode(photos[0].read_bytes()).decode()
    with serving(clean_env, "--image-urls") as (url, _):
        answer = httpx.post(f"{url}/v1/predict", json={"images": [photo, "http://[nonsense/photo"]}, timeout=60)
        first, second = answer.json()["predictions"]
        assert first["label"]
        assert second == {"error": "'http://[nonsense/photo' is not an address"}
        refused = httpx.post(f"{url}/v1/predict", json={"images": [photo, f"{url}/photo"]}, timeout=60)
        assert "is not a public address" in problem(refused, 403)
