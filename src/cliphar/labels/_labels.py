"""Labels are any words. Some are known by what they look like, and that is told to the text tower as well.

Describing a class by what is seen, rather than by its name alone: Menon and Vondrick, "Visual Classification via
Description from Large Language Models", 2023 (https://arxiv.org/abs/2210.07183). The descriptions of glossary.json
were written for cliphar.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from cliphar.errors import UsageError, one_line

__all__ = [
    "MAX_LABELS",
    "MAX_LABEL_LENGTH",
    "UNKNOWN",
    "clean_label",
    "clean_labels",
    "describe",
    "glossary",
    "prompts",
    "read_labels_file",
    "vocabularies",
    "with_score",
]

UNKNOWN = "unknown"
MAX_LABELS = 1000
MAX_LABEL_LENGTH = 200


def clean_label(label: str) -> str:
    """The label trimmed, underscores and runs of blanks as one space, each letter with its accents as one sign (NFC).

    A Mac names folders and what is in its archives by letters and accents apart; they look like what is typed.
    """
    return " ".join(unicodedata.normalize("NFC", label).replace("_", " ").split())


def clean_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Each by :func:`clean_label`, without empty ones and repeats; order is kept.

    Raises:
        UsageError: nothing is left, too many, or one is too long, is no text (a control character, half of a surrogate
            pair) or is the reserved word ``unknown``.
    """
    labels = labels.split(",") if isinstance(labels, str) else list(labels)
    for label in labels:
        if not isinstance(label, str):
            raise UsageError(f"label {label!r} is no text; labels are actions in plain words")
    cleaned = dict.fromkeys(map(clean_label, labels))
    cleaned.pop("", None)
    if not cleaned:
        raise UsageError('no labels: give at least one action, as in --labels "cooking, riding a bike"')
    if len(cleaned) > MAX_LABELS:
        raise UsageError(f"{len(cleaned):,} labels are too many; give at most {MAX_LABELS:,}")
    for label in cleaned:
        if len(label) > MAX_LABEL_LENGTH:
            raise UsageError(f"label {label[:30]!r}... has {len(label)} characters; at most {MAX_LABEL_LENGTH}")
        if one_line(label) != label:
            raise UsageError(
                f"label {label[:30]!r} is no text: it holds a control character or half of a surrogate pair"
            )
        if label.lower() == UNKNOWN:
            raise UsageError(f"{UNKNOWN!r} cannot be a label: it is the answer when none of them fits")
    return tuple(cleaned)


def read_labels_file(path: Path) -> tuple[str, ...]:
    """Labels of a text file, one a line; lines that start with # are comments.

    Raises:
        UsageError: the file cannot be read as UTF-8 text, or holds no usable label.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read labels from {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read labels from {path}: it is not UTF-8 text; save it as UTF-8") from error
    return clean_labels(line for line in lines if not line.lstrip().startswith("#"))


@functools.cache
def glossary() -> dict[str, tuple[str, ...]]:
    """Well-known actions and, for each, what a photo of it shows."""
    return _lists("glossary.json")


def describe(label: str) -> tuple[str, ...]:
    """What a photo of the action shows, if the glossary knows it; case, hyphens and articles do not matter."""
    return _index().get(_key(label), ())


def _key(name: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", name.lower().replace("-", " ")).split())


@functools.cache
def _index() -> dict[str, tuple[str, ...]]:
    return {_key(name): descriptions for name, descriptions in glossary().items()}


@functools.cache
def vocabularies() -> dict[str, tuple[str, ...]]:
    """Ready lists of actions by name, for a home, a kitchen and other places; the first is what mini was trained on."""
    return _lists("vocabularies.json")


def _lists(file: str) -> dict[str, tuple[str, ...]]:
    content = json.loads(Path(__file__).with_name(file).read_text(encoding="utf-8"))
    return {name: tuple(items) for name, items in content.items()}


def prompts(label: str, templates: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sentences that stand for a label: its name in every template, and its descriptions (may be none)."""
    return [template.replace("{}", label) for template in templates], list(describe(label))


def with_score(label: str, score: float) -> str:
    """``cooking  87%``; ``unknown`` alone, for its score is that of the label that comes nearest."""
    return label if label == UNKNOWN else f"{label}  {score:.0%}"
