from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from safetensors.numpy import save

import cliphar
from cliphar.bundle import (
    Bundle,
    BundleInfo,
    Calibration,
    ImageSpec,
    Metrics,
    Provenance,
    Source,
    TextSpec,
    packaged,
    write_bundle,
)
from cliphar.recognizer import Recognizer, load
from cliphar.runtime import Runtime
from serving_process import serving

PACKAGE = Path(cliphar.__file__).resolve().parent
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
RUNTIME = {"CLIPHAR_RUNTIME": "onnx"}  # the same arithmetic in every process, and none of them measures which is faster
os.environ |= RUNTIME


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A page's test may fail once: Chromium drops requests when the machine's network changes, as Docker does it."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=1))


# neither the time of day nor the speed of the machine decides
settings.register_profile("steady", deadline=None, database=None, derandomize=True)
settings.load_profile("steady")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background, and what is started here would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup; a handler is not inherited
    signal.signal(signal.SIGHUP, lambda *_: None)


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    unit_vectors: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return unit_vectors


class FakeRuntime(Runtime):
    """Deterministic and instant: a photo is its mean colour, a sentence is its digest. Counts what it is asked."""

    name = "fake"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.sentences: list[str] = []

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(len(images))
        return unit(images.astype(np.float64).mean((1, 2)) + 1e-3)

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.sentences += texts
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
        return unit(np.stack([np.random.default_rng(seed).normal(size=3) for seed in seeds]))


def calibration(**changes: Any) -> Calibration:
    fields: dict[str, Any] = {"logit_scale": 5.0, "conformal": ((0.5, 0.3), (0.9, 0.7), (0.95, 0.8)), "photos": 500}
    return Calibration(**(fields | {"unknown_below": -1.0} | changes))


@pytest.fixture
def make_info() -> Callable[..., BundleInfo]:
    """bundle.json of a tiny bundle whose three labels are red, green and blue."""

    def make(**changes: Any) -> BundleInfo:
        fields: dict[str, Any] = {
            "name": "tiny",
            "description": "made by a test",
            "labels": ("red", "green", "blue"),
            "embedding_dim": 3,
            "image": ImageSpec(size=16),
            "text": TextSpec(templates=("{}", "a photo of {}"), context_length=16),
            "known": calibration(),
            "open": calibration(logit_scale=50.0),
            "metrics": {"test": Metrics(description="held-out photos", n=10, values={"top1": 0.5})},
            "sources": (Source(name="a teacher", role="the space", licence="MIT"),),
            "limits": ("one person at a time",),
            "provenance": Provenance(
                recipe={"seed": 7},
                data_sha256="00",
                git_revision="abc",
                seed=7,
                versions={"numpy": "2"},
                hardware="cpu",
                created="2026-11-24T00:00:00Z",
            ),
        }
        return BundleInfo.model_validate(fields | changes)

    return make


@pytest.fixture
def head() -> bytes:
    return save({"class_vectors": np.eye(3, dtype=np.float32)})


@pytest.fixture
def tiny(tmp_path: Path, make_info: Callable[..., BundleInfo], head: bytes) -> Bundle:
    return write_bundle(tmp_path / "tiny", make_info(), {"head.safetensors": head})


@pytest.fixture
def fake_runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def fake(tiny: Bundle, fake_runtime: FakeRuntime) -> Recognizer:
    """A recogniser without any graph: batches of four."""
    return Recognizer(tiny, fake_runtime, batch_size=4)


@pytest.fixture(scope="session")
def mini() -> Iterator[Recognizer]:
    """The embedded model."""
    yield load(packaged("mini"), provider="cpu")


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service with the embedded model."""
    kept = {k: v for k, v in os.environ.items() if k != "MODEL_PATH" and not k.startswith("CLIPHAR_")}
    own = {"CLIPHAR_STATE": str(tmp_path_factory.mktemp("state")), "PYTHONPATH": str(PACKAGE.parent)}
    with serving(kept | own | RUNTIME) as (url, _):
        yield url


@pytest.fixture(scope="session")
def samples() -> Path:
    return PACKAGE / "assets" / "samples"


@pytest.fixture(scope="session")
def photos(samples: Path) -> list[Path]:
    return sorted(samples.glob("*.jpg"))


@pytest.fixture(scope="module")
def browser(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, whose camera sees a sample photo."""
    buffer = io.BytesIO()
    Image.open(samples / "portrait.jpg").convert("RGB").resize((640, 480)).save(buffer, "JPEG")
    film = tmp_path_factory.mktemp("camera") / "portrait.mjpeg"
    film.write_bytes(buffer.getvalue() * 10)
    camera = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    camera.append(f"--use-file-for-fake-video-capture={film}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM + camera)
        yield browser
        browser.close()


@pytest.fixture
def clean_env(tmp_path: Path) -> dict[str, str]:
    """An environment for a child process in which this machine's settings do not count."""
    kept = {k: v for k, v in os.environ.items() if k != "MODEL_PATH" and not k.startswith("CLIPHAR_")}
    own = {"PYTHONPATH": str(PACKAGE.parent), "CLIPHAR_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    return kept | own | RUNTIME


@pytest.fixture
def run_python(clean_env: dict[str, str]) -> Callable[[str], str]:
    """Run code in a fresh interpreter; its standard output."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=clean_env, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
