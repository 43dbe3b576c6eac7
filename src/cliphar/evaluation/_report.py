"""An evaluation as one file: HTML for people, which needs no other file, or JSON for programs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from cliphar.bundle import Bundle, write_whole
from cliphar.errors import MediaError, printable
from cliphar.evaluation._analysis import Analysis, Mistake
from cliphar.evaluation._compare import Comparison, harmonic_mean
from cliphar.evaluation._metrics import FIGURES, Report
from cliphar.evaluation._plots import confusion_svg, reliability_svg
from cliphar.media import decode_image

__all__ = ["EVALUATION_FILE", "Evaluation", "bundled_evaluation", "write_report"]

EVALUATION_FILE = "evaluation.json"

_THUMB = 176
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2433;--dim:#5d6678;--line:#d9dee8;--page:#fff;--blue:#2463c5;--red:#c2413a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--dim:#9aa4b5;--line:#363d4b;--page:#14171d;--blue:#6ea0f0;
--red:#f0837c}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.2rem;margin-top:2.5rem}p,figcaption,.dim{color:var(--dim)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .9rem .25rem 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:1.2rem 0}.tiles b{display:block;font-size:1.5rem}
.tiles small{color:var(--dim);display:block}
svg{width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--ink)}
.grid{stroke:var(--line);fill:none}.ideal{stroke:var(--dim);stroke-dasharray:5 4}.bar,.hit{fill:var(--blue)}
.miss{fill:var(--red)}.frame{fill:none;stroke:var(--line)}.strong{fill:var(--page)}
.wall{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1rem}
figure{margin:0;min-width:0}.wall img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:6px}
figcaption{font-size:.85rem;overflow-wrap:anywhere}figcaption b{color:var(--ink)}
.scroll{overflow-x:auto}.scroll svg{min-width:var(--least)}
"""


@dataclass(frozen=True)
class Evaluation:
    """All of one run of ``cliphar eval``: what was measured, with what, and beside what.

    ``novel`` is the report on labels that the model was not trained on, ``comparison`` the other model's.
    """

    model: str
    data: str
    analysis: Analysis
    images_per_s: float | None = None
    mistakes: Sequence[Mistake] = ()
    comparison: Comparison | None = None
    novel: Report | None = None

    def figures(self) -> dict[str, Any]:
        """The figures alone: what ``cliphar eval --json`` prints."""
        values: dict[str, Any] = self.analysis.report.to_dict()
        if self.images_per_s is not None:
            values["images_per_s"] = round(self.images_per_s, 1)
        values["ci95"] = {name: list(ends) for name, ends in self.analysis.ci95.items()}
        if self.novel is not None:
            mean = harmonic_mean(self.analysis.report.top1, self.novel.top1)
            values["novel"] = self.novel.to_dict() | {"harmonic_mean": round(mean, 6)}
        if self.comparison is not None:
            values["against"] = self.comparison.to_dict()
        return values

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        mistakes = [
            {"path": printable(str(m.path)), "truth": m.truth, "answer": m.answer, "score": round(m.score, 6)}
            for m in self.mistakes
        ]
        analysis = self.analysis.to_dict()
        return {"model": self.model, "data": printable(self.data)} | analysis | self.figures() | {"mistakes": mistakes}


def bundled_evaluation(bundle: Bundle) -> dict[str, Any] | None:
    """What the bundle's training measured, as ``Evaluation.to_dict`` has it; None where nothing came with it."""
    if EVALUATION_FILE not in bundle.info.files:
        return None
    values: dict[str, Any] = json.loads(bundle.file(EVALUATION_FILE).read_bytes())
    return values


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Write ``path`` whole: JSON if it ends in ``.json``, else HTML."""
    if path.suffix == ".json":
        text = json.dumps(evaluation.to_dict(), ensure_ascii=False, indent=1) + "\n"
    else:
        text = _html(evaluation)
    write_whole(path, text.encode())


def _html(evaluation: Evaluation) -> str:
    title = escape(f"{evaluation.model} on {printable(evaluation.data)}")
    analysis = evaluation.analysis
    speed = "" if evaluation.images_per_s is None else f", {evaluation.images_per_s:.1f} photos a second"
    body = [
        f"<h1>{escape(evaluation.model)}</h1>",
        f"<p>on {escape(printable(evaluation.data))}: {analysis.report.n} photos, "
        f"{len(analysis.labels)} labels{speed}. Beneath each figure, its 95 % interval.</p>",
        _tiles(analysis),
        "" if evaluation.comparison is None else _compared(evaluation.comparison),
        "" if evaluation.novel is None else _novel(analysis.report.top1, evaluation.novel),
        "<h2>Which labels are mistaken for which</h2>",
        "<p>Rows are the true labels, columns the answers, numbers are photos. Blue is right, red is wrong.</p>",
        _scrolling("Which labels are mistaken for which", confusion_svg(analysis.labels, analysis.confusion)),
        "<h2>Each label</h2>",
        _classes(analysis),
        "<h2>How honest the scores are</h2>",
        "<p>Of the photos answered with a score, the share answered right. On the dashed line, a score of 0.8 is "
        "right eight times in ten; bars below it are over-confident. Pale bars hold few photos.</p>",
        reliability_svg(analysis.reliability),
        _wall(evaluation.mistakes),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _tiles(analysis: Analysis) -> str:
    tiles = []
    for name, value in analysis.report.to_dict().items():
        ends = analysis.ci95.get(name)
        shown = f"{value}" if isinstance(value, int) else f"{value:.3f}"
        interval = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "&nbsp;"
        tiles.append(f"<div>{FIGURES[name]}<b>{shown}</b><small>{interval}</small></div>")
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _compared(comparison: Comparison) -> str:
    low, high = comparison.difference_ci95
    return (
        f"<h2>Against {escape(comparison.other)}</h2><p>Top-1 {comparison.difference:+.3f} ({low:+.3f} to {high:+.3f}) "
        f"over {comparison.other_top1:.3f}. {comparison.only_this} photos only this model got right, "
        f"{comparison.only_other} only the other: p = {comparison.p_value:.2g} (McNemar's exact test).</p>"
    )


def _novel(base: float, novel: Report) -> str:
    return (
        f"<h2>New labels</h2><p>On {novel.n} photos of labels it was not trained on, top-1 is {novel.top1:.3f}; "
        f"the harmonic mean with the {base:.3f} above is {harmonic_mean(base, novel.top1):.3f}.</p>"
    )


def _classes(analysis: Analysis) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("label", "photos", "precision", "recall", "F1"))
    rows = "".join(
        f"<tr><td>{escape(c.label)}</td><td>{c.n}</td><td>{c.precision:.3f}</td><td>{c.recall:.3f}</td>"
        f"<td>{c.f1:.3f}</td></tr>"
        for c in sorted(analysis.classes, key=lambda c: c.f1)
    )
    return _scrolling("Each label", f"<table><tr>{head}</tr>{rows}</table>")


def _scrolling(name: str, inside: str) -> str:
    # on a phone it is wider than the page, and without a tab stop keys cannot move it
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{inside}</div>'


def _wall(mistakes: Sequence[Mistake]) -> str:
    figures = []
    for mistake in mistakes:
        try:
            image = decode_image(mistake.path if mistake.image is None else mistake.image, min_side=_THUMB)
        except MediaError:
            continue  # it went away since it was measured
        image.thumbnail((2 * _THUMB, 2 * _THUMB))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=75)
        figures.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
            f"<figcaption><b>{escape(mistake.answer)}</b> {mistake.score:.2f}<br>is {escape(mistake.truth)}<br>"
            f"{escape(printable(mistake.path.name))}</figcaption></figure>"
        )
    if not figures:
        return ""
    return f'<h2>The most confident mistakes</h2><div class="wall">{"".join(figures)}</div>'
