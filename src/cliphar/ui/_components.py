"""What Streamlit lacks: photos from the clipboard. A few lines of script in the page itself, nothing fetched."""

from __future__ import annotations

import base64
import binascii

import streamlit as st

__all__ = ["pasted_photos"]

_PASTE_HTML = "<p>or paste one: <kbd>Ctrl</kbd> + <kbd>V</kbd></p>"
_PASTE_CSS = """
p { margin: 0; font: inherit; font-size: .875rem; opacity: .75; }
kbd { font: inherit; border: 1px solid currentColor; border-radius: .25rem; padding: 0 .3rem; }
@media (pointer: coarse) { p { display: none; } }
"""
_PASTE_JS = """
export default function ({ data, setTriggerValue }) {
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
  return () => document.removeEventListener("paste", paste);
}
"""


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
