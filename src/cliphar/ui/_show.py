"""Answers as bars: plain HTML that follows the theme's colours and can be read out."""

from __future__ import annotations

from html import escape

from cliphar.labels import UNKNOWN
from cliphar.recognizer import Prediction

__all__ = ["STYLE", "answer_html"]

STYLE = """<style>
.stMainBlockContainer { padding-top: 1rem; padding-bottom: 3rem; max-width: 76rem; }
.stAppHeader, .stAppHeader :not(button, button *) { background: transparent; pointer-events: none; }
.stMainBlockContainer h1 { font-size: 2.1rem; padding: .6rem 0 1rem; }
.stMainBlockContainer h2, .stMainBlockContainer h3 { font-size: 1.35rem; }
.stMultiSelect [data-tag] { background: color-mix(in srgb, #12948c 16%, transparent); color: inherit; }
.stMultiSelect [role="group"] { max-height: 17rem; }
.cl-answer { line-height: 1.35; }
.cl-answer h3 { font-size: 1.45rem; font-weight: 650; margin: 0; padding: 0; overflow-wrap: anywhere; }
.cl-answer p { margin: .15rem 0 .7rem; opacity: .8; font-size: .92rem; }
.cl-answer .cl-bars { list-style: none; margin: 0; padding: 0; }
.cl-answer .cl-bars li { margin: 0 0 .5rem; padding: 0; }
.cl-row { display: flex; justify-content: space-between; gap: 1rem; font-size: .95rem; }
.cl-row span:first-child { overflow-wrap: anywhere; }
.cl-row span:last-child { font-variant-numeric: tabular-nums; opacity: .85; }
.cl-track { height: .5rem; border-radius: .25rem; background: color-mix(in srgb, currentColor 12%, transparent); }
.cl-fill { height: 100%; min-width: 2px; border-radius: .25rem;
  background: color-mix(in srgb, currentColor 35%, transparent); }
.cl-in .cl-fill { background: #12948c; }
.cl-in .cl-row span:first-child { font-weight: 600; }
.cl-unknown h3 { font-style: italic; }
</style>"""


def answer_html(prediction: Prediction, coverage: float, bars: int) -> str:
    """The answer's headline, what it is worth in words, and a bar for each of the best labels."""
    best = prediction.top[0].label
    share = f"{coverage:.0%}".replace("%", " %")
    if prediction.label == UNKNOWN:
        kind, headline = " cl-unknown", "unknown"
        told = f"None of these actions fits well. The nearest is {escape(best)}."
    elif len(prediction.top) == 1:
        kind, headline = "", escape(best)
        told = "With one action in the list there is nothing to compare it with: add others."
    elif len(prediction.set) == 1:
        kind, headline = "", escape(best)
        told = f"Sure enough to name one: at {share} coverage it stands alone."
    else:
        kind, headline = "", escape(best)
        told = f"The true action is one of {len(prediction.set)} (filled) in {share} of such photos."
    rows = []
    for label, score in prediction.top[:bars]:
        inside = " class='cl-in'" if label in prediction.set else ""
        rows.append(
            f"<li{inside}><div class='cl-row'><span>{escape(label)}</span><span>{_percent(score)}</span></div>"
            f"<div class='cl-track' aria-hidden='true'><div class='cl-fill' style='width:{score:.1%}'></div></div></li>"
        )
    left = len(prediction.top) - bars
    more = f"<p>and {left} more below {_percent(prediction.top[bars].score)}</p>" if left > 0 else ""
    return (
        f"<div class='cl-answer{kind}' role='group' aria-label='answer'><h3>{headline}</h3><p>{told}</p>"
        f"<ul class='cl-bars'>{''.join(rows)}</ul>{more}</div>"
    )


def _percent(score: float) -> str:
    return "under 0.1 %" if score < 0.001 else f"{score * 100:.1f} %"
