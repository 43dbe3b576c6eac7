"""The model card, generated from what the bundle says of itself."""

from __future__ import annotations

from cliphar.bundle import Bundle
from cliphar.evaluation._metrics import FIGURES
from cliphar.recognizer import TAUGHT_FILE, read_taught

__all__ = ["model_card"]

_NAMES = {key: name for key, name in FIGURES.items() if key != "n"} | {"coverage": "coverage of 90 % sets"}


def model_card(bundle: Bundle) -> str:
    """Markdown: what it is, how good, what from, and what it is not good for; BundleError if it is damaged."""
    info = bundle.info
    taught = read_taught(bundle.file(TAUGHT_FILE), bundle) if TAUGHT_FILE in info.files else {}
    size = sum(file.bytes for file in info.files.values()) / 2**20
    lines = [
        f"# {info.name}",
        "",
        info.description,
        "",
        f"- input: {info.image.size} x {info.image.size} pixels, aspect kept up to {info.image.max_aspect:g}",
        f"- embedding: {info.embedding_dim} numbers; size: {size:.1f} MiB in {len(info.files)} files",
        f"- known actions: {', '.join(info.labels) or 'none'}",
        *([f"- taught from a few photos, not among the figures below: {', '.join(taught)}"] if taught else []),
        "- any other action in plain words, without retraining",
        "",
        "## Measured",
        "",
        "| what | photos | " + " | ".join(_NAMES.values()) + " |",
        "|---|---|" + "---|" * len(_NAMES),
    ]
    for metrics in info.metrics.values():
        cells = [f"{metrics.values[key]:.3f}" if key in metrics.values else "" for key in _NAMES]
        lines.append(f"| {metrics.description} | {metrics.n} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Calibrated on {info.known.photos} photos for the known actions and {info.open.photos} for other words, "
        "none of them reported above or trained on by the image tower.",
        "",
        *_runtimes(bundle),
        "## Learned from",
        "",
        "| source | used for | licence |",
        "|---|---|---|",
        *(f"| {source.name} | {source.role} | {source.licence} |" for source in info.sources),
        "",
        "## Not good for",
        "",
        *(f"- {limit}" for limit in info.limits),
        "",
        "## Made by",
        "",
        f"Recipe seed {info.provenance.seed}, data {info.provenance.data_sha256[:12]}, revision "
        f"{info.provenance.git_revision[:12]}, {info.provenance.created}, on {info.provenance.hardware}; "
        + ", ".join(f"{name} {version}" for name, version in info.provenance.versions.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _runtimes(bundle: Bundle) -> list[str]:
    """What each added runtime's answers were found to be like, beside those of image.onnx."""
    rows = []
    for name, file in bundle.runtimes.items():
        parity = bundle.info.files[file].parity if name != "onnx" else None
        if not parity:
            continue
        change = "{accuracy_difference:+.3f} ({difference_low:+.3f} to {difference_high:+.3f})"
        same = f"{parity['agreement']:.3f}" if "agreement" in parity else ""
        rows.append(
            f"| `{name}` | {parity['photos']:.0f} | {parity['cosine_mean']:.4f} | {same} "
            f"| {change.format(**parity) if 'accuracy_difference' in parity else ''} |"
        )
    if not rows:
        return []
    return [
        "Other runtimes, compared with `onnx`, which made these figures:",
        "",
        "| runtime | photos | mean cosine | same top-1 | accuracy, difference (95 %) |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
