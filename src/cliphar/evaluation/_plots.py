"""The report's plots, as inline SVG that takes its colours from the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len

from cliphar.evaluation._metrics import Bin

__all__ = ["confusion_svg", "reliability_svg"]


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'style="--wide:{width:g}px;--least:{max(min(480, width), width - 640):g}px;max-width:var(--wide)">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def reliability_svg(bins: Sequence[Bin]) -> str:
    """Share answered right over the score: bars on the diagonal are honest; a bar's strength is its share of photos."""
    side, left, top = 320.0, 44.0, 12.0
    most = max(one.n for one in bins)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + tick * side, top + (1 - tick) * side
        parts.append(f'<path class="grid" d="M{left} {y:g}h{side}M{x:g} {top}v{side}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}", 'text-anchor="end"'))
        parts.append(_text(x, top + side + 16, f"{tick:g}", 'text-anchor="middle"'))
    for one in bins:
        x, width = left + one.low * side, (one.high - one.low) * side
        note = f"score {one.low:.2f} to {one.high:.2f}: {one.n} photos, {one.accuracy:.1%} right"
        height = one.accuracy * side
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{top + side - height:.1f}" width="{width - 2:.1f}" '
            f'height="{height:.1f}" fill-opacity="{0.25 + 0.75 * one.n / most:.2f}"><title>{note}</title></rect>'
        )
    parts.append(f'<path class="ideal" d="M{left} {top + side}L{left + side} {top}"/>')
    parts.append(_text(left + side / 2, top + side + 36, "score", 'text-anchor="middle"'))
    middle = top + side / 2
    parts.append(_text(11, middle, "answered right", f'text-anchor="middle" transform="rotate(-90 11 {middle:g})"'))
    return _svg(left + side + 12, top + side + 44, "Reliability diagram", parts)


def confusion_svg(labels: Sequence[str], confusion: NDArray[np.int64]) -> str:
    """Rows are true labels, columns answers; a cell's strength is its share of the row."""
    count = len(labels)
    cell = 34.0 if count <= 20 else max(10.0, 680.0 / count)
    font = min(12.0, cell * 0.85)
    edge = 12 + 0.56 * font * max(map(cell_len, labels))
    side = cell * count
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    parts = []
    for i, label in enumerate(labels):
        middle = edge + (i + 0.5) * cell
        parts.append(_text(edge - 6, middle + font / 3, label, f'text-anchor="end" font-size="{font:g}"'))
        turned = f'transform="rotate(-90 {middle + font / 3:g} {edge - 6:g})" font-size="{font:g}"'
        parts.append(_text(middle + font / 3, edge - 6, label, turned))
    parts.append(f'<rect class="frame" x="{edge:g}" y="{edge:g}" width="{side:g}" height="{side:g}"/>')
    for i, j in np.argwhere(confusion):
        x, y, n, share = edge + j * cell, edge + i * cell, int(confusion[i, j]), float(shares[i, j])
        note = escape(f"{labels[i]} answered {labels[j]}: {n}, {share:.1%} of its photos")
        kind = "hit" if i == j else "miss"
        parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{cell:g}" height="{cell:g}" '
            f'fill-opacity="{0.06 + 0.94 * share:.2f}"><title>{note}</title></rect>'
        )
        if cell >= 24:
            strong = 'class="strong" ' if share > 0.55 else ""
            parts.append(_text(x + cell / 2, y + cell / 2 + 4, str(n), f'{strong}text-anchor="middle" font-size="11"'))
    return _svg(edge + side + 4, edge + side + 4, "Confusion matrix: rows true labels, columns answers", parts)
