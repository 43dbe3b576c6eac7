"""Answers as bars, plain HTML in the theme's colours that can be read out; and as a table to take along."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from cliphar.errors import MediaError
from cliphar.evaluation import Mistake
from cliphar.labels import UNKNOWN
from cliphar.media import ImageLike, decode_image
from cliphar.recognizer import Prediction

__all__ = ["STYLE", "answer_html", "figures_html", "mistakes_html", "speeds_html", "spreadsheet", "thumbnail"]

_FIGURES = {
    "top1": "right",
    "top5": "among the best five",
    "macro_f1": "macro F1",
    "ece": "calibration error",
    "coverage": "of 90 % sets hold the truth",
    "set_size": "labels in a set",
    "unknown": "answered unknown",
}

STYLE = """<style>
.stMainBlockContainer { padding-top: 1rem; padding-bottom: 3rem; max-width: 76rem; }
.stAppHeader, .stAppHeader :not(button, button *) { background: transparent; pointer-events: none; }
.stMainBlockContainer h1 { font-size: 2.1rem; padding: .6rem 0 1rem; }
.stMainBlockContainer :is(h2, h3) { font-size: 1.35rem; }
.stMultiSelect [data-tag] { background: color-mix(in srgb, #12948c 16%, transparent); color: inherit; }
.stMultiSelect [role="group"] { max-height: 17rem; }
.stMultiSelect button[aria-label="Open"] { display: none; }
[data-testid="stMultiSelectDropdown"]:has([data-empty]) { visibility: hidden; }
.stApp :is(a, button, summary, [role="tab"], [tabindex="-1"]):focus-visible {
  outline: 2px solid #12948c; outline-offset: 2px; }
.st-key-samples img, .st-key-examples img { aspect-ratio: 1; object-fit: cover; }
.stApp :is([role=tab], .stSlider div) { color: inherit; }
.stApp [data-testid="stCaptionContainer"] { opacity: .8; }
[class*="st-key-answer_"] img { max-height: 24rem; object-fit: contain; }
.cl-answer { line-height: 1.35; overflow-wrap: anywhere; }
.cl-answer h2 { font-size: 1.45rem; font-weight: 650; margin: 0; padding: 0; }
.cl-answer p { margin: .15rem 0 .7rem; opacity: .8; font-size: .92rem; }
.cl-answer .cl-bars { list-style: none; margin: 0; padding: 0; }
.cl-answer .cl-bars li { margin: 0 0 .5rem; padding: 0; }
.cl-row { display: flex; justify-content: space-between; gap: 1rem; font-size: .95rem; }
.cl-row span { font-variant-numeric: tabular-nums; opacity: .85; white-space: nowrap; }
.cl-row i { position: absolute; width: 1px; overflow: hidden; clip-path: inset(50%); } /* is read out */
.cl-track { height: .5rem; border-radius: .25rem; background: color-mix(in srgb, currentColor 12%, transparent); }
.cl-fill { height: 100%; min-width: 2px; border-radius: .25rem;
  background: color-mix(in srgb, currentColor 35%, transparent); }
.cl-in .cl-fill { background: #12948c; }
.cl-in bdi { font-weight: 600; }
.cl-unknown h2 { font-style: italic; }
.cl-keys { font-size: .9rem; margin-top: .4rem; }
.cl-keys > span { display: inline-block; margin-right: 1rem; overflow-wrap: anywhere; }
.cl-figures p { margin: 0 0 .5rem; opacity: .8; font-size: .92rem; }
.cl-figures ul { list-style: none; display: flex; flex-wrap: wrap; gap: .7rem 1.6rem; margin: 0 0 1rem; padding: 0; }
.cl-figures li { margin: 0; padding: 0; font-size: .85rem; }
.cl-figures b { display: block; font-size: 1.35rem; font-weight: 500; font-variant-numeric: tabular-nums;
  line-height: 1.25; }
.cl-figures small { font-weight: 400; font-size: .8rem; opacity: .75; }
.cl-wall { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
.cl-wall figure { margin: 0; }
.cl-wall img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: .5rem; }
.cl-wall figcaption { font-size: .85rem; overflow-wrap: anywhere; }
/* without this a page whose service is slow, or away and asked again, looks as if nothing were going on */
.stApp[data-test-script-state="running"]::after { content: "waiting for the answer"; position: fixed; z-index: 999;
  right: 1rem; bottom: 1rem; padding: .4rem .9rem; border-radius: 1rem; background: #0b7a75; color: #fff;
  animation: cl-late 1s step-end; }
@keyframes cl-late { from { visibility: hidden; } }
/* columns are one below the other here: answers before the list that they are chosen from */
@media (max-width: 640px) {
  .stHorizontalBlock:has(> .stColumn .st-key-choices) { flex-direction: column; gap: 1rem; }
  .stColumn:has(.st-key-choices), .stVerticalBlock:has(> * > .st-key-choices) { display: contents; }
  .stHorizontalBlock:has(> .stColumn .st-key-choices) > .stColumn { width: 100%; }
  :has(> .st-key-choices) { order: 1; }
  [class*="st-key-answer_"] img { max-height: 15rem; }
}
@media (max-width: 30rem) { .st-key-pages a :has(> [data-testid="stIconMaterial"]) { display: none; } }
.st-key-card [data-testid="stHeaderActionElements"] { display: none; }
.st-key-card table { font-size: .85rem; display: block; overflow-x: auto; }
.st-key-card :is(th, td) { padding: .3rem .45rem; }
</style>"""


def thumbnail(image: ImageLike, side: int) -> bytes:
    """A JPEG of at most ``side`` x ``side`` pixels; MediaError if the photo cannot be read."""
    small = decode_image(image, min_side=side)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def answer_html(prediction: Prediction, coverage: float, bars: int) -> str:
    """The answer's headline, its worth in words, and bars for the best labels."""
    best = prediction.top[0].label
    share = f"{coverage:.0%}".replace("%", " %")
    named = f"<bdi>{escape(best)}</bdi>"
    kind, headline = "", named
    if prediction.label == UNKNOWN:
        kind, headline = " cl-unknown", "unknown"
        told = f"None of these actions fits well. The nearest is {named}."
    elif len(prediction.top) == 1:
        told = "With one action in the list there is nothing to compare it with: add others."
    elif len(prediction.set) == 1:
        told = f"Sure enough to name one: at {share} no second bar is needed."
    else:
        told = f"The true action is one of {len(prediction.set)} (filled) in {share} of such photos."
    rows = []
    for label, score in prediction.top[:bars]:
        inside, read = (" class='cl-in'", "<i>, in the set</i>") if label in prediction.set else ("", "")
        rows.append(
            f"<li{inside}><div class='cl-row'><bdi>{escape(label)}</bdi><span>{_percent(score)}{read}</span></div>"
            f"<div class='cl-track' aria-hidden='true'><div class='cl-fill' style='width:{score:.1%}'></div></div></li>"
        )
    left = len(prediction.top) - bars
    more = f"<p>and {left} more, the next {_percent(prediction.top[bars].score)}</p>" if left > 0 else ""
    return (
        f"<div class='cl-answer{kind}' role='group' aria-label='answer'><h2>{headline}</h2><p>{told}</p>"
        f"<ul class='cl-bars'>{''.join(rows)}</ul>{more}</div>"
    )


def figures_html(title: str, photos: int, values: Mapping[str, float], ci95: Mapping[str, Any] | None = None) -> str:
    """Figures with their names and, where known, their 95 % intervals."""
    parts = []
    for key, name in _FIGURES.items():
        if key not in values:
            continue
        shown = _figure(key, values[key])
        ends = (ci95 or {}).get(key)
        interval = f" <small>({_figure(key, ends[0])} to {_figure(key, ends[1])})</small>" if ends else ""
        parts.append(f"<li><b>{shown}{interval}</b>{name}</li>")
    return f"<div class='cl-figures'><p>{escape(title)}, {photos} photos</p><ul>{''.join(parts)}</ul></div>"


def _figure(key: str, value: float) -> str:
    return f"{value:.1f}" if key == "set_size" else f"{value:.2f}" if key == "macro_f1" else f"{value * 100:.1f} %"


def mistakes_html(mistakes: Sequence[Mistake]) -> str:
    """The photos with the wrong answers and the true labels."""
    figures = []
    for one in mistakes:
        try:
            picture = base64.b64encode(thumbnail(one.image or one.path, 240)).decode()
        except MediaError:
            continue  # gone since
        figures.append(
            f"<figure><img alt='{escape(one.path.name)}' src='data:image/jpeg;base64,{picture}'>"
            f"<figcaption><b>{escape(one.answer)}</b> {_percent(one.score)}<br>truth: {escape(one.truth)}</figcaption>"
            "</figure>"
        )
    return f"<div class='cl-wall'>{''.join(figures)}</div>"


def speeds_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each runtime's photos a second, and what one photo takes."""
    single = {row["runtime"]: row["p50_ms"] for row in rows if row["batch"] == 1}
    many = sorted((row for row in rows if row["batch"] > 1), key=lambda row: -row["images_per_s"])
    parts = []
    for row in many:
        width = row["images_per_s"] / many[0]["images_per_s"]
        told = f"{row['images_per_s']:.0f} photos a second"
        parts.append(
            f"<li class='cl-in'><div class='cl-row'><bdi>{escape(row['runtime'])}</bdi><span>{told}</span></div>"
            f"<div class='cl-track' aria-hidden='true'><div class='cl-fill' style='width:{width:.1%}'></div></div>"
            f"<p>{single[row['runtime']]:.1f} ms for one photo, {row['memory_mib']:.0f} MiB of memory, "
            f"{row['load_s']:.1f} s to load, {row['file_mib']:.1f} MiB on disk</p></li>"
        )
    note = f"The model alone, batches of {many[0]['batch']} photos, {many[0]['threads']} threads." if many else ""
    return f"<div class='cl-answer'><p>{note}</p><ul class='cl-bars'>{''.join(parts)}</ul></div>"


def spreadsheet(rows: Iterable[Sequence[str]]) -> bytes:
    """Rows as CSV for spreadsheets: UTF-8 that says so, or they misread letters, and an apostrophe before what they
    would run as a formula: the name of a file, or of an action that somebody else taught."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(
        [f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell for cell in row] for row in rows
    )
    return buffer.getvalue().encode("utf-8-sig")


def _percent(score: float) -> str:
    return "under 0.1 %" if score < 0.001 else f"{score * 100:.1f} %"
