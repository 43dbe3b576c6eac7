"""Actions in plain words: cleaning a list of labels, what well-known actions look like, ready vocabularies."""

from cliphar.labels._labels import (
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    UNKNOWN,
    clean_label,
    clean_labels,
    describe,
    glossary,
    prompts,
    read_labels_file,
    vocabularies,
    with_score,
)

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
