"""Behind nginx with TLS, as docs/serving.md has it: the API and the page under paths of one host."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from websockets.sync.client import connect

from cliphar.client import Client
from cliphar.recognizer import Prediction
from cliphar.ui._remote import RemoteBackend
from serving_process import free_port

pytestmark = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
ROOT = Path(__file__).resolve().parent.parent
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxy")


@pytest.fixture(scope="module")
def ports() -> tuple[int, int, int]:
    return free_port(), free_port(), free_port()


@pytest.fixture(scope="module")
def host(place: Path, ports: tuple[int, int, int]) -> Iterator[str]:
    """https://127.0.0.1:PORT, when the API answers there and the page does."""
    api, page, front = ports
    request = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=host -addext subjectAltName=IP:127.0.0.1"
    request += " -keyout host.key -out host.crt"
    subprocess.run(["openssl", "req", *request.split()], cwd=place, check=True, capture_output=True)
    text = (ROOT / "docs" / "serving.md").read_text()
    found = re.search(r"^    map \$http_upgrade.*?^    }$", text, re.DOTALL | re.MULTILINE)
    assert found
    shown = found[0].replace("listen 443 ssl", f"listen 127.0.0.1:{front} ssl")
    shown = shown.replace("127.0.0.1:8000", f"127.0.0.1:{api}").replace("127.0.0.1:8501", f"127.0.0.1:{page}")
    # and one that takes the prefix off, and little at once
    bare = f"client_max_body_size 1m; proxy_pass http://127.0.0.1:{api}/;"
    shown = shown[: shown.rindex("}")] + f"location /cliphar/bare/ {{ {bare} }}\n}}"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {place}/{kind};\n" for kind in kinds)
    config = place / "nginx.conf"
    config.write_text(
        f"daemon off;\nuser root;\npid {place}/pid;\nerror_log {place}/error;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{folders}{shown}\n}}\n"
    )
    up = [sys.executable, "-m", "cliphar", "up", "--port", str(api), "--page-port", str(page)]
    up += ["--root-path", "/cliphar/api", "--base-path", "/cliphar"]
    kept = {k: v for k, v in os.environ.items() if k != "MODEL_PATH" and not k.startswith("CLIPHAR_")}
    own = {"PYTHONPATH": str(ROOT / "src"), "CLIPHAR_HOME": str(place / "home"), "CLIPHAR_RUNTIME": "onnx"}
    with (
        subprocess.Popen(["nginx", "-c", str(config)]) as nginx,
        subprocess.Popen(up, env=kept | own, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            while line := process.stdout.readline():
                if line.startswith("Try"):
                    break
            assert line
            yield f"https://127.0.0.1:{front}"
        finally:
            process.terminate()
            process.communicate(timeout=60)
            nginx.terminate()


@pytest.fixture
def trusted(host: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SSL_CERT_FILE", str(place / "host.crt"))
    return f"{host}/cliphar/api"


def test_the_api_and_all_that_it_names_is_below_its_path(
    trusted: str, host: str, ports: tuple[int, int, int], photos: list[Path], place: Path
) -> None:
    clip = place / "clip.gif"
    frames = [Image.open(photo).convert("RGB").resize((160, 120)) for photo in photos]
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=1000)
    for url in (trusted, f"{host}/cliphar/bare"):
        with Client(url) as client:
            assert all(isinstance(answer, Prediction) for answer in client.predict(photos, ["cooking", "smiling"]))
            client.put_vocabulary("two", ["a", "b"])
            assert "timeline" in [*client.video(clip)][-1]
        assert "swagger" in httpx.get(f"{url}/static-offline-docs/swagger-ui.css").text
    with Client(url) as client:
        large, small = client.predict([bytes(2**20), photos[0]])
        assert isinstance(small, Prediction) and "larger than a proxy" in str(large)
    assert httpx.get(f"{trusted}/").json()["docs"] == "/cliphar/api/docs"
    assert httpx.get(f"{trusted}/openapi.json").json()["servers"] == [{"url": "/cliphar/api"}]
    assert httpx.get(f"{trusted}/v1/labels/").headers["location"] == f"{trusted}/v1/labels"
    assert httpx.get(f"{trusted}/livez").status_code == 200
    assert httpx.get(f"{trusted}/metrics").status_code == 404
    for path in ("", "/cliphar/api"):  # probes and Prometheus come past the proxy
        direct = f"http://127.0.0.1:{ports[0]}{path}"
        assert httpx.get(f"{direct}/readyz").status_code == 200
        assert 'route="/v1/predict"' in httpx.get(f"{direct}/metrics").text
    stream = trusted.replace("https", "wss") + "/v1/stream"
    with connect(stream, origin=host) as camera:  # type: ignore[call-overload]
        camera.send(photos[0].read_bytes())
        assert "label" in json.loads(camera.recv(60))
    with closing(RemoteBackend(trusted)) as backend, closing(backend.watch(["smiling", "cooking"])) as watch:
        assert watch(np.zeros((64, 64, 3), np.uint8)).label


@pytest.fixture
def page(browser: Browser, host: str) -> Iterator[Page]:
    """A window on that host. Nothing may be asked beside the two paths."""
    context = browser.new_context(ignore_https_errors=True, permissions=["camera"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda one: asked.append(one.url))
    yield page
    context.close()
    assert asked
    own = re.compile(rf"(https|wss)://{re.escape(host.removeprefix('https://'))}/cliphar(/|$)|data:|blob:")
    assert [url for url in asked if not own.match(url)] == []


def test_the_page_is_below_its_path(page: Page, host: str, photos: list[Path]) -> None:
    with page.expect_response(re.compile(r"\.js$")) as script:
        page.goto(f"{host}/cliphar")
    assert script.value.headers["content-encoding"] == "gzip"
    expect(page.get_by_text("Answers by mini")).to_be_visible()
    page.locator("input[type=file]").set_input_files(str(photos[0]))
    expect(page.locator(".cl-answer")).to_have_count(1)
    page.get_by_role("link", name="Video").click()
    expect(page).to_have_url(re.compile("/cliphar/video$"))
    page.reload()  # an address that a visitor keeps
    page.get_by_role("button", name="Try the sample clip").click()
    page.get_by_role("button", name=re.compile(r"^\d:.* to ")).nth(1).click()
    page.wait_for_function("document.querySelector('video')?.currentTime > 1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Subtitles (WebVTT)").click()
    assert Path(download.value.path()).read_text().startswith("WEBVTT")
    page.get_by_role("link", name="Live").click()
    start = page.frame_locator("iframe[title*=webrtc]").get_by_role("button", name="Start")
    now = page.get_by_text("Now: ")
    start.wait_for()
    for _ in range(24):  # on a busy machine the first connection may be given up
        if now.is_visible():
            break
        if start.is_visible() and start.is_enabled():
            start.click()
        page.wait_for_timeout(5_000)
    expect(now).to_be_visible()


def test_the_api_s_documentation_is_below_its_path(page: Page, host: str) -> None:
    page.goto(f"{host}/cliphar/api/docs")
    page.locator("#operations-operations-livez").get_by_role("button").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text('"alive"')
