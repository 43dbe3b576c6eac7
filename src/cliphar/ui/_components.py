"""What Streamlit lacks: photos from the clipboard, drawings that take the theme's colours, clips that play from a place
each time one asks, and focus that stays when a button goes away. A few lines of script in the page itself, nothing
fetched."""

from __future__ import annotations

import base64
import binascii
import re

import streamlit as st

__all__ = ["drawing", "keep_focus", "pasted_photos", "plain", "play_from"]

_PASTE_HTML = "<p hidden>or paste one: <kbd>Ctrl</kbd> + <kbd>V</kbd></p>"
_PASTE_CSS = """
p { margin: 0; font: inherit; font-size: .875rem; opacity: .75; }
kbd { font: inherit; border: 1px solid currentColor; border-radius: .25rem; padding: 0 .3rem; }
@media (pointer: coarse) { p { display: none; } }
"""
_PASTE_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  if (/Mac/.test(navigator.platform)) parentElement.querySelector("kbd").textContent = "\u2318";
  const encode = (file) => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done({ name: file.name, data: reader.result.split(",")[1] || "" });
    reader.onerror = failed;
    reader.readAsDataURL(file);
  });
  const paste = async (event) => {
    const files = [...(event.clipboardData?.files || [])].filter((file) => file.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    const large = files.filter((file) => file.size > data.max_bytes).map((file) => file.name);
    const small = files.filter((file) => file.size <= data.max_bytes);
    setTriggerValue("pasted", { photos: await Promise.all(small.map(encode)), large });
  };
  document.addEventListener("paste", paste);
  parentElement.querySelector("p").hidden = false;
  return () => document.removeEventListener("paste", paste);
}
"""
_DRAWING_CSS = """
.drawing { overflow-x: auto; color: var(--st-text-color); font-family: var(--st-font); }
svg { width: 100%; height: auto; font-size: 12px; fill: currentColor; display: block; margin: 0 0 1rem; }
.wide svg { min-width: var(--least); }
.grid, .frame { stroke: color-mix(in srgb, currentColor 18%, transparent); fill: none; }
.ideal { stroke: currentColor; opacity: .6; stroke-dasharray: 5 4; }
.bar, .hit { fill: #12948c; }
.miss { fill: #d0453e; }
.strong { fill: #fff; }
"""
_DRAWING_JS = """
export default function ({ data, parentElement }) {
  const place = parentElement.querySelector(".drawing");
  place.classList.toggle("wide", data.wide);
  place.tabIndex = data.wide ? 0 : -1;  // what scrolls must be reached by keys
  place.innerHTML = data.svg;
}
"""
_PLAY_HTML = "<p hidden>This browser cannot play such a clip: take the annotated video below.</p>"
_PLAY_CSS = "p { margin: .5rem 0; font: inherit; font-size: .875rem; }"
_PLAY_JS = """
export default function ({ data, parentElement }) {
  const video = document.querySelector("video");
  const before = parentElement.asked;
  parentElement.asked = data.asked;
  if (video && before !== undefined && before !== data.asked) {
    video.currentTime = data.start_s;
    video.play().catch(() => { video.muted = true; return video.play(); }).catch(() => {});
  }
  const look = () => { parentElement.querySelector("p").hidden = !document.querySelector("video")?.error; };
  const when = ["error", "loadedmetadata"];
  when.forEach((event) => document.addEventListener(event, look, true));
  look();
  return () => when.forEach((event) => document.removeEventListener(event, look, true));
}
"""
_FOCUS_JS = """
export default function () {
  let places = [];
  const remember = (event) => {
    places = [];
    for (let place = event.target; place && place !== document.body; place = place.parentElement) places.push(place);
  };
  const look = () => {
    if (!places.length || places[0].isConnected || document.activeElement !== document.body) return;
    const left = places.find((place) => place.isConnected);
    if (!left) return;
    left.tabIndex = -1;
    left.focus({ preventScroll: true });
  };
  const observer = new MutationObserver(look);
  document.addEventListener("focusin", remember);
  observer.observe(document.body, { childList: true, subtree: true });
  return () => {
    document.removeEventListener("focusin", remember);
    observer.disconnect();
  };
}
"""


def plain(text: str) -> str:
    """Any words, as Markdown shows them unchanged; what runs from right to left leaves the text around it in place."""
    escaped = re.sub(r"[\\`*_~$:<>\[\]#|]", r"\\\g<0>", text)
    return escaped if text.isascii() else f"\u2068{escaped}\u2069"


def drawing(key: str, svg: str, *, wide: bool = False) -> None:
    """An SVG of ``cliphar.evaluation``; a ``wide`` one keeps its size on a phone and scrolls."""
    component = st.components.v2.component(
        "cliphar_drawing", html="<div class='drawing'></div>", css=_DRAWING_CSS, js=_DRAWING_JS
    )
    component(key=key, data={"svg": svg, "wide": wide})


def play_from(start_s: float, asked: int) -> None:
    """Play the page's clip from ``start_s`` whenever ``asked``, a count, has changed; say so if it cannot be played."""
    component = st.components.v2.component("cliphar_play", html=_PLAY_HTML, css=_PLAY_CSS, js=_PLAY_JS)
    component(key="play", data={"start_s": start_s, "asked": asked})


def keep_focus() -> None:
    """When the focused button goes away, focus what it stood in, so that Tab goes on from there."""
    st.components.v2.component("cliphar_focus", js=_FOCUS_JS)(key="focus")


def pasted_photos(key: str, max_mb: int) -> tuple[list[tuple[str, bytes]], list[str]]:
    """A hint that photos can be pasted; those pasted just now, as name and bytes, and the names of those too large."""
    component = st.components.v2.component("cliphar_paste", html=_PASTE_HTML, css=_PASTE_CSS, js=_PASTE_JS)
    result = component(key=key, data={"max_bytes": max_mb << 20}, on_pasted_change=lambda: None)
    if not result.pasted:
        return [], []
    photos = []
    for item in result.pasted["photos"]:
        try:
            photos.append((str(item["name"]), base64.b64decode(item["data"], validate=True)))
        except binascii.Error:
            continue  # a browser does not send this; whoever does is answered nothing
    return photos, [str(name) for name in result.pasted["large"]]
