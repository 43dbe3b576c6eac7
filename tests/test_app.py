from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
from av import VideoFrame
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, TimeoutError, expect
from streamlit.testing.v1 import AppTest

from cliphar.bundle import packaged, read_bundle, write_bundle
from cliphar.client import Client
from cliphar.errors import ClipharError, DataError, MediaError, UsageError
from cliphar.evaluation import Evaluation, analyse
from cliphar.labels import clean_labels, vocabularies
from cliphar.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cliphar.recognizer import Prediction, Recognizer, Score, load
from cliphar.timeline import Segment, Timeline
from cliphar.ui._backend import Photo
from cliphar.ui._camera import Camera
from cliphar.ui._evaluate import _check_sizes
from cliphar.ui._launch import ice_servers, launch
from cliphar.ui._photo import _csv
from cliphar.ui._remote import RemoteBackend, _Watch
from cliphar.ui._show import STYLE, spreadsheet
from cliphar.ui._speed import measure_round_trips
from cliphar.ui._video import _TYPES, _bar, _clock
from serving_process import free_port

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "src/cliphar/ui/_app.py"
APP = [sys.executable, "-m", "cliphar", "app", "--port"]
expect.set_options(timeout=60_000)  # the machine may be busy


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODEL_PATH", "CLIPHAR_"))}
    return kept | {"PYTHONPATH": str(ROOT / "src")} | more


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    """A page on a port of its own, when it answers."""
    port = free_port()
    command = [*APP, str(port), *options]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5):
                return process, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[0])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process, url = start()
    yield url
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The Photo page in a window of its own. Nothing may be asked of any other machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, permissions=["camera"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    answers = page.get_by_text("Answers by mini")
    try:
        answers.wait_for(timeout=30_000)
    except TimeoutError:
        page.reload()  # Chromium drops what it loads when a container changes the machine's network
        answers.wait_for()
    expect(page.get_by_test_id("stStatusWidget")).to_have_count(0)
    yield page
    context.close()
    own = re.compile(rf"(http|ws)://{re.escape(address.removeprefix('http://'))}/|data:|blob:")
    assert [url for url in asked if not own.match(url)] == []


def visit(page: Page, name: str, heading: str) -> None:
    page.get_by_role("link", name=name).click()
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    expect(page.get_by_test_id("stStatusWidget")).to_have_count(0)


def test_photos_are_answered_and_answers_follow_the_list(page: Page, photos: list[Path]) -> None:
    page.locator("input[type=file]").set_input_files([str(photo) for photo in photos])
    expect(page.locator(".cl-answer")).to_have_count(len(photos))
    expect(page.get_by_role("img", name="the photo portrait.jpg")).to_be_visible()
    words = page.get_by_role("combobox", name="Actions to choose from")
    words.fill("smiling for a portrait, photographing a tower")
    words.press("Enter")
    words.press("Escape")
    expect(page.get_by_text("smiling for a portrait").first).to_be_visible()
    expect(page.locator(".cl-answer").first.get_by_role("listitem")).to_have_count(5)
    expect(page.locator(".cl-in").first).to_contain_text("in the set")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download answers").click()
    head, *rows = download.value.path().read_text("utf-8-sig").splitlines()
    assert (head, len(rows)) == ("path,label,score,set,error", len(photos))
    page.get_by_role("button", name="Clear all photos").click()
    expect(page.locator(".cl-answer")).to_have_count(0)


def add_action(page: Page, word: str) -> None:
    words = page.get_by_role("combobox", name="Actions to choose from")
    words.fill(word)
    words.press("Enter")
    words.press("Escape")
    expect(page.locator("[data-tag]").last).to_have_text(word)


def test_the_word_that_is_typed_is_added_and_not_one_that_looks_like_it(page: Page) -> None:
    for word in "run", "walk":
        add_action(page, word)
    assert page.locator("[data-tag]").all_inner_texts()[-2:] == ["run", "walk"]


def test_pages_that_are_left_while_they_are_drawn_keep_the_list(page: Page) -> None:
    add_action(page, "walk")
    page.locator("input[type=range]").press("ArrowLeft")
    expect(page.get_by_text("85 %", exact=True)).to_be_visible()
    for path in (
        ("Video", "Live"),
        ("Photo", "Video"),
        ("Live", "Photo"),
        ("Teach", "Live", "Video"),
        ("Models", "Photo"),
    ):
        for name in path:
            page.get_by_role("link", name=name).click()
            page.wait_for_timeout(60)
        page.wait_for_timeout(1500)
        # Streamlit may lose a click while it draws
        if not page.url.endswith(f"/{path[-1].lower().replace('photo', '')}"):
            page.get_by_role("link", name=path[-1]).click()
        expect(page.locator("[data-tag]").last).to_have_text("walk")
        expect(page.get_by_text("85 %", exact=True)).to_have_count(0 if path[-1] == "Live" else 1)


def test_on_a_phone_the_answers_stand_above_the_list(page: Page, photos: list[Path]) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("input[type=file]").set_input_files(str(photos[0]))
    expect(page.locator(".cl-answer")).to_have_count(1)
    answer, words = (page.locator(one).bounding_box() for one in (".cl-answer", ".st-key-choices"))
    assert answer and words
    assert answer["y"] + answer["height"] < words["y"]
    assert answer["x"] >= 0 and answer["x"] + answer["width"] <= 390


def test_a_long_action_makes_the_page_no_wider_on_a_phone(browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    words = "carrying a box " * 12
    page.set_content(STYLE + _bar(Timeline(9, (Segment(0, 9, words, 0.9, (words,)),), 9, 1)))
    assert page.get_by_text(words).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_a_damaged_photo_is_refused_in_words_and_the_others_are_answered(
    page: Page, photos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:200])
    page.locator("input[type=file]").set_input_files([str(broken), str(photos[0])])
    expect(page.get_by_text("broken.jpg was left out")).to_be_visible()
    expect(page.locator(".cl-answer")).to_have_count(1)
    page.get_by_label(f"Remove {photos[0].name}").click()  # its cross
    expect(page.locator(".cl-answer")).to_have_count(0)


def test_a_photo_can_be_pasted(page: Page, photos: list[Path]) -> None:
    page.get_by_text("or paste one").wait_for()
    paste(page, photos[0])
    expect(page.locator(".cl-answer")).to_have_count(1)


def paste(page: Page, photo: Path) -> None:
    page.evaluate(
        """(encoded) => {
            const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
            const clipboard = new DataTransfer();
            clipboard.items.add(new File([bytes], "pasted.jpg", { type: "image/jpeg" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: clipboard }));
        }""",
        base64.b64encode(photo.read_bytes()).decode(),
    )


def test_an_action_is_taught_kept_and_used(page: Page, photos: list[Path]) -> None:
    visit(page, "Teach", "Teach it an action")
    page.get_by_role("button", name="Teach", exact=True).click()
    expect(page.get_by_text("Give the action a name first")).to_be_visible()
    page.get_by_role("textbox", name="Name of the action").fill("standing for the camera")
    page.locator("input[type=file]").set_input_files([str(photo) for photo in photos])
    expect(page.get_by_role("img", name="example: ")).to_have_count(3)
    page.get_by_role("button", name="Teach", exact=True).click()
    expect(page.get_by_text(re.compile("^[0-3] of 3$"))).to_be_visible()
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_text("standing for the camera, from 3 photos")).to_be_visible()
    visit(page, "Photo", "What are they doing?")
    page.locator("input[type=file]").set_input_files(str(photos[-1]))
    expect(page.locator(".cl-answer h2")).to_have_text("standing for the camera")


def test_a_photo_is_taken_with_the_camera(page: Page) -> None:
    switch = page.get_by_text("Turn on the camera")
    end = time.monotonic() + 60
    while not switch.is_visible() and time.monotonic() < end:  # a page that is still being drawn may forget a click
        page.get_by_role("tab", name="Camera").click()
        page.wait_for_timeout(500)
    switch.click()
    # before the camera's first picture a photo is empty
    page.wait_for_function("document.querySelector('[data-testid=stCameraInput] video')?.readyState >= 2")
    page.get_by_role("button", name="Take Photo").click()
    expect(page.get_by_role("img", name="the photo")).to_be_visible()


def old_clip() -> bytes:
    """One that ffmpeg reads, and no browser."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 64, 48
        for _ in range(5):
            file.mux(stream.encode(VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        file.mux(stream.encode())
    return buffer.getvalue()


def test_a_clip_has_a_timeline_that_can_be_clicked_and_taken_along(page: Page) -> None:
    visit(page, "Video", "What happens when?")
    page.get_by_role("button", name="Try the sample clip").click()
    segments = page.get_by_role("button", name=re.compile(r"^\d:.* to "))
    for at, low, high in (1, 1, 18), (1, 1, 18), (0, 0, 5):  # the same one again, and the very beginning
        expect(segments.nth(at)).to_be_visible()
        segments.nth(at).click()
        page.wait_for_function(
            f"""() => {{
                const video = document.querySelector("video");
                return video && !video.paused && {low} < video.currentTime && video.currentTime < {high};
            }}"""
        )
        page.evaluate("document.querySelector('video').currentTime = 19")
    for button, start in ("Table (CSV)", b"start_s"), ("Subtitles (WebVTT)", b"WEBVTT"), ("Annotated video (MP4)", b""):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert start in Path(download.value.path()).read_bytes()[:200]
    page.locator("input[type=file]").set_input_files(
        {"name": "old.avi", "mimeType": "video/x-msvideo", "buffer": old_clip()}
    )
    expect(page.get_by_text("This browser cannot play such a clip")).to_be_visible()
    page.locator("input[type=file]").set_input_files(
        {"name": "no clip.mp4", "mimeType": "video/mp4", "buffer": b"no clip"}
    )
    expect(page.get_by_text(re.compile("no clip.mp4: .*not a video"))).to_be_visible()
    page.get_by_role("button", name="Clear the clip").dblclick()
    expect(page.get_by_role("button", name="Try the sample clip")).to_be_visible()


def go_live(page: Page, press: Callable[[], None]) -> None:
    """Press Start until the camera is answered: on a busy machine the first connection may be given up."""
    start = page.frame_locator("iframe[title*=webrtc]").get_by_role("button", name="Start")
    now = page.get_by_text("Now: ")
    start.wait_for()
    end = time.monotonic() + 120
    while not now.is_visible() and time.monotonic() < end:
        if start.is_visible() and start.is_enabled():
            press()
        page.wait_for_timeout(5_000)
    expect(now).to_be_visible()


def test_the_camera_is_answered_live(page: Page) -> None:
    visit(page, "Live", "What is happening now?")
    frame = page.frame_locator("iframe[title*=webrtc]")
    go_live(page, frame.get_by_role("button", name="Start").click)
    size = frame.locator("video").evaluate("video => [video.videoWidth, video.videoHeight]")
    assert size == [640, 480]
    page.get_by_role("button", name="Remove calling").click()
    expect(page.get_by_text("From frame to answer")).to_be_visible()
    frame.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Press Start and allow")).to_be_visible()


def test_ice_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = '[{"urls": "turn:a?transport=tcp", "username": "u", "credential": "c"}]'
    for text, urls in ("", []), ("stun:a, stun:b:1,", ["stun:a", "stun:b:1"]), (turn, ["turn:a?transport=tcp"]):
        monkeypatch.setenv("CLIPHAR_ICE_SERVERS", text)
        assert [url for server in ice_servers() for url in server["urls"]] == urls
    assert ice_servers()[0]["credential"] == "c"
    for wrong in ("turn:a", "a:1", "[", "[3]", turn.replace("credential", "x")):
        monkeypatch.setenv("CLIPHAR_ICE_SERVERS", wrong)
        with pytest.raises(UsageError, match="needs its"):
            launch("127.0.0.1", free_port())


def test_a_wrong_address_or_key_of_the_api_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="'api:8000' is not a service's address"):
        launch("127.0.0.1", free_port(), api="api:8000")
    with monkeypatch.context() as here, pytest.raises(UsageError, match="proxy that the environment names cannot be"):
        here.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")  # as desktops set it
        launch("127.0.0.1", free_port(), api="http://127.0.0.1:9")
    monkeypatch.setenv("CLIPHAR_API_KEY_FILE", str(tmp_path))
    with pytest.raises(UsageError, match="cannot read the key"):
        launch("127.0.0.1", free_port(), api="http://127.0.0.1:1")


def reach(page: Page, name: str) -> None:
    """Press Tab until what has this name is focused, which must be seen."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page.keyboard.press("Tab")
        found, seen = page.evaluate(
            """() => {
                let at = document.activeElement;
                while (at.contentDocument) at = at.contentDocument.activeElement;
                const field = at.matches("input");
                const named = field || at.matches("a, button, [role=tab]");
                const name = named ? (at.ariaLabel || at.innerText).replaceAll("\\n", " ") : "";
                const ripples = at.ownerDocument !== document;  // the camera's buttons show it in another way
                return [name, field || ripples || getComputedStyle(at).outlineStyle !== "none"];
            }"""
        )
        if re.search(name, found):
            assert seen, f"no outline around {found}"
            return
    raise AssertionError(f"Tab never comes to {name}")


def test_a_keyboard_is_enough(page: Page, photos: list[Path]) -> None:
    reach(page, "Try portrait")
    page.keyboard.press("Enter")
    expect(page.locator(".cl-answer")).to_have_count(1)
    expect(page.locator(".cl-answer").get_by_role("heading")).to_have_text("smiling at the camera")
    expect(page.locator(":focus")).to_be_visible()  # its place has the focus
    with page.expect_download():
        reach(page, "Download answers")
        page.keyboard.press("Enter")
    reach(page, "^Actions to choose from")
    page.keyboard.type("waving a flag")
    page.keyboard.press("Enter")
    word = page.locator("[data-tag]", has_text="waving a flag")
    expect(word).to_be_visible()
    page.keyboard.press("Escape")
    restore = page.get_by_role("button", name="Restore this list")
    expect(restore).to_be_visible()
    expect(page.get_by_role("combobox", name="Actions to choose from")).to_be_focused()
    page.keyboard.press("Backspace")
    expect(word).to_have_count(0)
    expect(restore).to_have_count(0)
    reach(page, "^How often")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("85 %", exact=True)).to_be_visible()
    expect(page.locator("input[type=range]")).to_be_focused()
    expect(page.locator(".cl-answer")).to_contain_text("in 85 %")  # two requests in one instant: Streamlit may lose one

    reach(page, "Video")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="What happens when?")).to_be_visible()
    reach(page, "Try the sample clip")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Annotated video")).to_be_visible()
    segment = page.get_by_role("button", name=re.compile(r"^\d:.* to ")).nth(1)
    reach(page, re.escape(segment.inner_text().split("\n")[-1]))
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('video')?.currentTime > 1")
    expect(segment).to_be_focused()

    reach(page, "Teach")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Teach it an action")).to_be_visible()
    for decide in ("Discard it", "Keep it"):
        reach(page, "Name of the action")
        page.keyboard.type("standing for the camera")
        with page.expect_file_chooser() as chooser:
            reach(page, "Upload")
            page.keyboard.press("Enter")
        chooser.value.set_files([str(photo) for photo in photos])
        expect(page.get_by_role("img", name="example: ")).to_have_count(3)
        reach(page, "^Teach$")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name=decide)).to_be_visible()
        reach(page, decide)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name=decide)).to_have_count(0)
    kept = page.get_by_text("standing for the camera, from 3 photos")
    expect(kept).to_be_visible()
    reach(page, "Forget")
    page.keyboard.press("Space")
    expect(kept).to_have_count(0)

    reach(page, "Live")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="What is happening now?")).to_be_visible()

    def press(button: str) -> None:
        reach(page, f"(?i)^{button}$")
        page.keyboard.press("Enter")

    go_live(page, lambda: press("Start"))
    press("Stop")
    expect(page.get_by_text("Press Start and allow")).to_be_visible()


def test_a_model_is_measured_on_photos_of_ones_own(page: Page, photos: list[Path], tmp_path: Path) -> None:
    visit(page, "Models", "Which model answers?")
    top1 = read_bundle(packaged("mini")).info.metrics["known"].values["top1"]
    expect(page.get_by_text(f"{100 * top1:.1f} %")).to_be_visible()
    archive = tmp_path / "mine.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for photo in photos:
            file.write(photo, f"mine/{'being_a_cat' if photo.stem == 'cat' else 'standing'}/{photo.name}")
        file.writestr("mine/standing/broken.jpg", photos[0].read_bytes()[:200])
    page.locator("input[type=file]").set_input_files(archive)
    page.get_by_role("button", name="Measure on these photos").click()
    expect(page.get_by_role("img", name="Confusion matrix")).to_be_visible()
    expect(page.get_by_role("img", name="Reliability diagram")).to_be_visible()
    expect(page.get_by_text("1 photo could not be read")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Report (JSON)").click()
    assert json.loads(download.value.path().read_text())["labels"] == ["being a cat", "standing"]
    reach(page, "How good")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="How fast")).to_be_focused()
    page.keyboard.press("Enter")
    reach(page, "Measure the speed")
    page.keyboard.press("Enter")
    page.wait_for_function(
        """() => {
            const hint = getComputedStyle(document.querySelector(".stApp"), "::after");
            return hint.content.includes("waiting") && hint.visibility === "visible";
        }"""
    )
    expect(page.get_by_text(re.compile(r"^\d+ photos a second$")).first).to_be_visible(timeout=180_000)
    page.get_by_role("tab", name="Model card").click()
    expect(page.get_by_role("heading", name="Not good for")).to_be_visible()


def test_another_model_is_chosen_and_keeps_what_it_was_taught(
    mini: Recognizer, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = mini.predict(photos, ["standing", "being a cat"])
    analysis = analyse(answers, ["being a cat", "standing", "standing"], ["standing", "being a cat"])
    files: dict[str, Path | bytes] = {name: mini.bundle.file(name) for name in mini.bundle.info.files}
    files["evaluation.json"] = json.dumps(Evaluation("other", "three photos", analysis).to_dict()).encode()
    info = mini.bundle.info.model_copy(update={"name": "other", "labels": mini.labels})
    write_bundle(tmp_path / "other", info, files)
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path))
    monkeypatch.delenv("MODEL_PATH", raising=False)
    script = AppTest.from_string(
        "from cliphar.ui._app import app\nfrom cliphar.ui._models import models_page\n"
        "import streamlit as st\napp()\nmodels_page()",
        default_timeout=120,
    ).run()
    assert not script.exception
    backend = script.session_state["backend"]
    backend.teach("saluting", [Photo(photo.name, photo.read_bytes(), photo.name, b"") for photo in photos])
    backend.keep()
    words = script.session_state["lists"]["What the model knows"]
    script.session_state["lists"]["What the model knows"] = [*words[1:], "juggling eggs"]
    script.selectbox(key="model").set_value(str(tmp_path / "other")).run()
    assert not script.exception
    assert script.session_state["lists"]["What the model knows"] == [*mini.labels[1:], "juggling eggs"]
    assert script.session_state["ready_lists"]["What the model knows"] == [*mini.labels]
    assert script.session_state["backend"].where.startswith("other")
    assert script.session_state["backend"].taught == {}
    assert "saluting" not in script.session_state["lists"]["What the model knows"]
    script.selectbox(key="model").set_value(str(packaged("mini"))).run()
    assert script.session_state["backend"].taught == {"saluting": len(photos)}
    assert "saluting" in script.session_state["lists"]["What the model knows"]


def test_a_service_answers_where_there_is_one(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "cliphar", "serve", "--port", str(port)]
    service = subprocess.Popen(command, env=environment(CLIPHAR_STATE=str(tmp_path)))
    try:
        with Client(f"http://127.0.0.1:{port}", retry_s=60) as client:
            client.model()
        monkeypatch.setenv("CLIPHAR_API_URL", f"http://127.0.0.1:{port}")
        script = AppTest.from_file(str(SCRIPT), default_timeout=120).run()
        assert not script.exception
        assert f"at `http://127.0.0.1:{port}" in script.caption[-1].value
        proxied = RemoteBackend(f"http://user:secret@127.0.0.1:{port}")
        assert proxied.where == f"mini at `http://127.0.0.1:{port}`"
        backend = RemoteBackend(f"http://127.0.0.1:{port}")
        shown = [Photo(photo.name, photo.read_bytes(), photo.name, b"") for photo in photos]
        labels = ["taking a photo", "smiling for a portrait"]
        expected = load(packaged("mini")).predict([photo.data for photo in shown], labels)
        found = backend.answer([*shown, Photo("bad", b"bad", "bad", b"")], labels, 0.9)
        assert [one.label for one in found if isinstance(one, Prediction)] == [one.label for one in expected]
        assert isinstance(found[-1], MediaError)
        assert min(measure_round_trips(backend)) > 0
        about = backend.about()
        assert (about.name, about.evaluation) == ("mini", None)
        assert about.metrics["known"].n == 674
        frame = np.asarray(Image.open(photos[-1]).convert("RGB"))
        watch = backend.watch(["unknown"])
        for _ in range(3):  # not "no answer": there is one
            with pytest.raises(ClipharError, match="cannot be a label"):
                watch(frame)
        watch = backend.watch(labels)
        assert watch(frame).top[0].label in labels
        watch.close()
        backend.teach("saluting", shown)
        backend.discard()
        assert backend.taught == {}
        backend.teach("saluting", shown)
        backend.keep()
        assert backend.taught == {"saluting": len(shown)}
        with pytest.raises(UsageError, match="'saluting' was taught already; forget it first"):
            backend.teach("Saluting_", shown)  # the same to the service
        backend.forget("saluting")
        assert "saluting" not in backend.labels
        assert watch(frame).top[0].label in labels
        service.terminate()
        service.wait(60)
        with pytest.raises(ClipharError, match="can be reached: the page goes on trying"):
            watch(frame)
        with pytest.raises(ClipharError, match=rf"no answer from ws://127.0.0.1:{port}/v1/stream"):  # and no password
            proxied.watch(labels)(frame)
        backend.close()
        proxied.close()
        script.session_state["backend"].close()
    finally:
        service.terminate()
        service.wait(60)


def test_a_service_that_wants_a_key_says_where_the_page_takes_it_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    keys = tmp_path / "keys.txt"
    keys.write_text(f"page {hashlib.sha256(b'right').hexdigest()}\n")
    command = [sys.executable, "-m", "cliphar", "serve", "--port", str(port), "--api-keys", str(keys)]
    service = subprocess.Popen(command, env=environment(CLIPHAR_STATE=str(tmp_path)))
    try:
        with Client(f"http://127.0.0.1:{port}", api_key="right", retry_s=60) as client:
            client.model()
        monkeypatch.setenv("CLIPHAR_API_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("CLIPHAR_API_KEY", "wrong")
        script = AppTest.from_file(str(SCRIPT), default_timeout=120).run()
        assert not script.exception
        assert "refuses this page: give a key" in script.error[0].value
        assert "in CLIPHAR_API_KEY, or" in script.error[0].value
        monkeypatch.setenv("CLIPHAR_API_KEY", "right")
        script.run()
        assert not script.error
        url, frame = f"http://127.0.0.1:{port}", np.zeros((48, 64, 3), np.uint8)
        with monkeypatch.context() as other, pytest.raises(ClipharError, match="/v1/stream refuses the camera: give a"):
            other.setenv("CLIPHAR_API_KEY", "wrong")
            _Watch(url, url, ["a"])(frame)
        RemoteBackend(f"http://user:secret@127.0.0.1:{port}").close()  # the password leaves the key its place
        keys.write_text(f"page {hashlib.sha256(b'newer').hexdigest()}\n")
        (tmp_path / "key").write_text("newer\n")
        monkeypatch.setenv("CLIPHAR_API_KEY_FILE", str(tmp_path / "key"))
        script.session_state["backend"]._told_at = -9.0  # what it was told is old
        assert not script.run().error  # the session goes on with the key that is there now
        script.session_state["backend"].close()
    finally:
        service.terminate()
        service.wait(60)


def test_a_camera_goes_on_without_answers_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch:
        fails = True
        closed = False

        def __call__(self, frame: NDArray[np.uint8]) -> Prediction:
            if self.fails:
                raise ClipharError("no answer")
            return Prediction("sitting", 0.9, ("sitting",), (Score("sitting", 0.9),), 0.3)

        def close(self) -> None:
            self.closed = True

    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = Watch()
    camera = Camera(watch)
    frame = VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
    assert camera.recv(frame) is frame
    assert camera.trouble == "no answer"
    watch.fails = False
    assert camera.recv(frame) is frame  # it asks again after a second
    now += 1.1
    assert camera.recv(frame) is not frame
    assert camera.trouble is None
    other = Watch()
    camera.ask(other)  # another list: the connection of the one before is let go
    assert not watch.closed
    assert camera.recv(frame) is frame
    assert (watch.closed, other.closed) == (True, False)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.delenv("MODEL_PATH", raising=False)
    return AppTest.from_file(str(SCRIPT), default_timeout=120).run()


def test_each_list_keeps_what_was_changed(script: AppTest) -> None:
    assert not script.exception
    assert script.multiselect(key="photo_actions").value == list(vocabularies()["Everyday actions"])
    script.selectbox(key="photo_list").set_value("Kitchen").run()
    kitchen = list(vocabularies()["Kitchen"])
    assert script.multiselect(key="photo_actions").value == kitchen
    script.multiselect(key="photo_actions").set_value([*kitchen, "flipping a pancake,  juggling_eggs"]).run()
    longer = [*kitchen, "flipping a pancake", "juggling eggs"]
    assert script.multiselect(key="photo_actions").value == longer
    script.selectbox(key="photo_list").set_value("Sports").run()
    script.selectbox(key="photo_list").set_value("Kitchen").run()
    assert script.multiselect(key="photo_actions").value == longer


def test_heic_is_taken_where_it_can_be_read(script: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    def types() -> list[str]:
        (field,) = script.run().get("file_uploader")
        return list(field.proto.type)

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert ".heic" not in types()
    there = ModuleType("pillow_heif")
    there.__spec__ = ModuleSpec("pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", there)
    assert set(types()) == IMAGE_SUFFIXES


def test_any_video_is_taken() -> None:
    assert {f".{one}" for one in _TYPES} == VIDEO_SUFFIXES - IMAGE_SUFFIXES


def test_a_taught_name_may_have_a_comma(script: AppTest) -> None:
    words = script.session_state["lists"]["What the model knows"]
    words.append("opening a door, slowly")
    script.run()
    script.multiselect(key="photo_actions").set_value([*words, "waving, nodding"]).run()
    assert script.multiselect(key="photo_actions").value[-3:] == ["opening a door, slowly", "waving", "nodding"]


def test_a_clip_is_answered_anew_once_an_action_is_taught_or_another_model_answers() -> None:
    def page() -> None:
        from types import SimpleNamespace

        import streamlit as st

        from cliphar.timeline import Timeline
        from cliphar.ui._session import know_action
        from cliphar.ui._video import _read

        answers = iter([Timeline(1, (), 1, 1), Timeline(2, (), 1, 1)])
        st.session_state.backend = SimpleNamespace(where="here", labels=("saluting",), video=lambda *_: [next(answers)])
        seen = [_read(b"clip", ("saluting",), 0.9).duration_s for _ in range(2)]
        know_action("saluting")
        seen.append(_read(b"clip", ("saluting",), 0.9).duration_s)
        other = SimpleNamespace(where="here", labels=("saluting",), video=lambda *_: [Timeline(3, (), 1, 1)])
        st.session_state.before, st.session_state.backend = st.session_state.backend, other  # a model of the same name
        st.session_state.seen = [*seen, _read(b"clip", ("saluting",), 0.9).duration_s]

    script = AppTest.from_function(page, default_timeout=120).run()
    assert not script.exception
    assert script.session_state["seen"] == [1, 1, 2, 3]


def test_what_was_forgotten_meanwhile_is_not_kept() -> None:
    def page() -> None:
        from types import SimpleNamespace

        import streamlit as st

        from cliphar.recognizer import Lesson
        from cliphar.ui._teach import _keep

        st.session_state.backend = SimpleNamespace(keep=lambda: None, taught={}, labels=())
        st.session_state.lesson = Lesson("saluting", 3, (), None, ())
        _keep(st.session_state.lesson)

    script = AppTest.from_function(page, default_timeout=120).run()
    assert not script.exception
    assert script.session_state["refused"] == "'saluting' is not known any more; teach it again"
    assert script.session_state["lesson"]  # its photos and name too


def test_what_was_refused_moves_nothing_when_it_goes(script: AppTest) -> None:
    places = len(script.main.children)  # the browser makes anew what moves, without what was being typed into it
    script.session_state["refused"] = "no answer"
    script.run()
    assert script.error[0].value == "no answer."
    assert len(script.main.children) == places
    assert not script.run().error


def test_a_table_is_read_by_spreadsheets_and_runs_nothing() -> None:
    table = spreadsheet([("path", "label"), ("=1+1.jpg", "\u0447\u0438\u0442\u0430\u0442\u044c"), ("-.jpg", '"a", b')])
    assert table.startswith(b"\xef\xbb\xbf")
    assert list(csv.reader(io.StringIO(table.decode("utf-8-sig"))))[1:] == [
        ["'=1+1.jpg", "\u0447\u0438\u0442\u0430\u0442\u044c"],
        ["'-.jpg", '"a", b'],
    ]
    assert b"a.jpg,,,,damaged" in _csv([Photo("a.jpg", b"", "", b"")], [MediaError("damaged")])


def test_no_minute_has_sixty_seconds() -> None:
    assert [_clock(seconds) for seconds in (0, 59.94, 59.96, 3661.25)] == ["0:00.0", "0:59.9", "1:00.0", "61:01.2"]


def test_what_cannot_be_an_action_is_said(script: AppTest) -> None:
    script.multiselect(key="photo_actions").set_value(["unknown"]).run()
    assert "cannot be a label" in script.warning[0].value
    assert script.multiselect(key="photo_actions").value == list(vocabularies()["Everyday actions"])


def test_a_model_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "/no/such/bundle")
    script = AppTest.from_file(str(SCRIPT), default_timeout=120).run()
    assert not script.exception
    assert "/no/such/bundle" in script.error[0].value
    done = subprocess.run([*APP, str(free_port())], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*APP, str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"cliphar: cannot listen on .*\n", done.stderr)


@pytest.mark.parametrize("name", vocabularies())
def test_ready_lists_are_clean(name: str) -> None:
    assert clean_labels(vocabularies()[name]) == vocabularies()[name]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.jpg", bytes(51 * 2**20))
    with pytest.raises(DataError, match=r"a/1\.jpg in bomb\.zip has 51 MB"):
        _check_sizes(archive)


def test_an_archive_that_is_none_or_cut_short_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "mine.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/1.jpg", bytes(1000))
    for content in archive.read_bytes()[:500], b"no archive", b"":
        archive.write_bytes(content)
        with pytest.raises(DataError, match=r"mine\.zip is damaged, or neither a zip nor a tar file"):
            _check_sizes(archive)
