"""The page of a container, used in Chromium: browser.py ADDRESS PHOTO..."""

import re
import sys

from playwright.sync_api import expect, sync_playwright

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def main(address: str, photos: list[str]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page.get_by_text("Answers by mini")).to_be_visible(timeout=60_000)
        page.locator("input[type=file]").set_input_files(photos)
        expect(page.locator(".cl-answer")).to_have_count(len(photos), timeout=60_000)
        browser.close()
    own = re.compile(rf"(http|ws)://{re.escape(address.removeprefix('http://'))}/|data:|blob:")
    strange = [url for url in asked if not own.match(url)]
    assert not strange, f"asked of other machines: {strange}"
    print(f"{len(photos)} photos are answered")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
