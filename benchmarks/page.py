"""How quick the web page is in a real browser, and whether twenty visitors at once are served.

    python benchmarks/page.py               # the page with the model in its own process, then asking a service
    python benchmarks/page.py --visitors 5

Needs Chromium and playwright. First paint: from the request to the page's heading. Answer: from the choice of the
photos to their bars; edit: from the Enter that adds a word to its bar, both as the browser's own clock has it. The
visitors at once are sessions over the page's WebSocket without a browser's drawing, which would take more of the
machine than the page.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, TimeoutError, async_playwright
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Common_pb2 import StringArray
from streamlit.proto.Element_pb2 import Element
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.asyncio.client import ClientConnection, connect

from cliphar.bundle import packaged

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PHOTOS = sorted(packaged("samples").glob("*.jpg"))
WORDS = ["taking a photo", "riding a bike", "mowing the lawn", "painting a wall", "folding laundry", "chopping wood"]
CLOCK = """
addEventListener('keydown', (event) => { if (event.key === 'Enter') window.since = performance.now(); }, true);
addEventListener('change', (event) => { if (event.target.type === 'file') window.since = performance.now(); }, true);
new MutationObserver(() => {
  if (!window.awaited?.()) return;
  window.took = performance.now() - window.since;
  window.awaited = null;
}).observe(document, { subtree: true, childList: true, characterData: true });
"""
ANSWERED = "count => { window.awaited = () => document.querySelectorAll('.cl-answer').length === count; }"
EDITED = """word => {
  window.awaited = () => [...document.querySelectorAll('.cl-answer li')].some((bar) => bar.textContent.includes(word));
}"""


@contextmanager
def running(*arguments: str, health: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cliphar", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(health, timeout=5):  # noqa: S310 - an address of our own making
                    break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"cliphar {arguments[0]} ended") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


async def opened(browser: Browser, url: str) -> tuple[Page, float]:
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    page = await context.new_page()
    await page.add_init_script(CLOCK)
    title = page.get_by_role("heading", name="What are they doing?")
    while True:
        since = time.perf_counter()
        await page.goto(url)
        try:
            await title.wait_for(timeout=20_000)
        except TimeoutError:  # Chromium drops what it loads when a container elsewhere changes the network
            print("  (Chromium dropped the page; once more)")
        else:
            return page, time.perf_counter() - since


async def answered(page: Page, photos: list[Path]) -> float:
    await page.evaluate(ANSWERED, len(photos))
    await page.locator("input[type=file]").set_input_files(photos)
    return await _took(page)


async def choose_own_list(page: Page) -> None:
    await page.get_by_role("combobox", name="List of actions").click()
    await page.get_by_role("option", name="Your own").click()
    await page.get_by_text("The list of actions is empty").wait_for()
    await page.keyboard.press("Escape")  # an open list hides the other fields


async def edited(page: Page, word: str) -> float:
    field = page.get_by_role("combobox", name="Actions to choose from")
    await field.fill(word)
    await page.evaluate(EDITED, word)
    await field.press("Enter")
    took = await _took(page)
    await page.keyboard.press("Escape")
    await page.wait_for_timeout(300)  # a person does not type the next word before the page is at rest
    return took


async def _took(page: Page) -> float:
    await page.wait_for_function("window.awaited === null")
    took: float = await page.evaluate("window.took")
    return took


async def alone(url: str) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page, cold = await opened(browser, url)
        print(f"  first paint, the first visitor: {cold:.2f} s")
        print(f"  answer to {len(PHOTOS)} photos: {await answered(page, PHOTOS):.0f} ms")
        await choose_own_list(page)
        times = [await edited(page, word) for word in WORDS]
        print(f"  edit: median {statistics.median(times):.0f} ms of " + ", ".join(f"{took:.0f}" for took in times))
        await page.context.close()
        warm = []
        for _ in range(5):
            page, took = await opened(browser, url)
            warm.append(took)
            await page.context.close()
        print(f"  first paint, later visitors: median {statistics.median(warm):.2f} s")
        await browser.close()


class Visitor:
    """A session as a browser has it: messages over the page's WebSocket, none of the drawing."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._values: dict[str, WidgetState] = {}
        self.page = ""
        self.elements: list[Element] = []

    async def run(self, values: Mapping[str, bool | str | list[str]] = {}, *, page: str | None = None) -> float:
        """Give widgets (by a button's or a field's label) values, and wait until the page is drawn; seconds."""
        trigger = None
        for label, value in values.items():
            known = next(one for one in map(_widget, self.elements) if one and one.label.startswith(label))
            if isinstance(value, bool):
                trigger = WidgetState(id=known.id, trigger_value=value)
            elif isinstance(value, str):
                self._values[label] = WidgetState(id=known.id, string_value=value)
            else:
                self._values[label] = WidgetState(id=known.id, string_array_value=StringArray(data=value))
        message = BackMsg()
        message.rerun_script.widget_states.widgets.extend([*self._values.values(), *([trigger] if trigger else [])])
        if page is not None:
            message.rerun_script.page_name = page
        else:
            message.rerun_script.page_script_hash = self.page
        since = time.perf_counter()
        await self._socket.send(message.SerializeToString())
        self.elements = []
        while True:
            told = ForwardMsg.FromString(await self._socket.recv())
            if told.HasField("navigation"):
                self.page = told.navigation.page_script_hash
            if told.HasField("delta") and told.delta.HasField("new_element"):
                self.elements.append(told.delta.new_element)
            if told.HasField("script_finished") and told.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                return time.perf_counter() - since

    @property
    def errors(self) -> list[str]:
        return [
            one.alert.body if one.HasField("alert") else one.exception.message
            for one in self.elements
            if (one.HasField("alert") and one.alert.format == one.alert.ERROR) or one.HasField("exception")
        ]

    @property
    def answers(self) -> str:
        return "".join(one.html.body for one in self.elements if one.HasField("html") and "cl-answer" in one.html.body)


def _widget(element: Element) -> Any:
    kind = element.WhichOneof("type")
    return getattr(element, kind) if kind in ("button", "selectbox", "multiselect") else None


async def together(url: str, visitors: int) -> None:
    errors: list[str] = []
    edits: list[float] = []

    async def visit(number: int) -> None:
        try:
            address = f"{url.replace('http', 'ws', 1)}/_stcore/stream"
            async with connect(address, max_size=None, open_timeout=60, ping_interval=None) as socket:
                visitor = Visitor(socket)
                await visitor.run(page="")
                await visitor.run({f"Try {PHOTOS[number % 3].stem}": True})
                words: list[str] = []
                for word in WORDS:
                    words.append(f"{word} {number}")
                    edits.append(await visitor.run({"Actions to choose from": words}))
                    if words[-1] not in visitor.answers:
                        errors.append(f"no answer about {words[-1]}")
                    errors.extend(visitor.errors)
                await visitor.run(page="models")
                errors.extend(visitor.errors)
        except Exception as error:  # every kind counts as one
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

    since = time.perf_counter()
    await asyncio.gather(*(visit(number) for number in range(visitors)))
    print(
        f"  {visitors} sessions at once, each with a photo, {len(WORDS)} edits and two pages: {len(errors)} errors "
        f"in {time.perf_counter() - since:.1f} s, edits median {1000 * statistics.median(edits or [0]):.0f} ms"
    )
    for error in dict.fromkeys(errors):
        print(f"    {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--port", type=int, default=8791, help="this one and the next must be free")
    given = parser.parse_args()
    url, api = f"http://127.0.0.1:{given.port}", f"http://127.0.0.1:{given.port + 1}"
    page, health = ["app", "--port", str(given.port)], f"{url}/_stcore/health"
    with tempfile.TemporaryDirectory() as state:
        os.environ["CLIPHAR_STATE"] = state
        for title, options in (("the model in the page's process", []), ("asking a service", ["--api", api])):
            print(title)
            with running("serve", "--port", str(given.port + 1), health=f"{api}/readyz"):
                with running(*page, *options, health=health):
                    asyncio.run(alone(url))
                with running(*page, *options, health=health):
                    asyncio.run(together(url, given.visitors))


if __name__ == "__main__":
    main()
