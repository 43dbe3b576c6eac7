"""Labelled and captioned photos: reading them, finding near-duplicates, splitting."""

from cliphar.data._duplicates import difference_hash, group_duplicates
from cliphar.data._sources import Photo, list_labelled, read_captioned, read_labelled
from cliphar.data._split import split_grouped

__all__ = [
    "Photo",
    "difference_hash",
    "group_duplicates",
    "list_labelled",
    "read_captioned",
    "read_labelled",
    "split_grouped",
]
