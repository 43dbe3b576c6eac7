"""Labelled and captioned photos and clips: reading them, finding near-duplicates, splitting, caching."""

from cliphar.data._cache import PhotoSet, load_photos
from cliphar.data._duplicates import difference_hash, group_duplicates
from cliphar.data._readers import SPLITS, PhotoSource, is_clip_name, open_source
from cliphar.data._sources import Photo, list_labelled, read_captioned, read_labelled
from cliphar.data._split import split_grouped

__all__ = [
    "SPLITS",
    "Photo",
    "PhotoSet",
    "PhotoSource",
    "difference_hash",
    "group_duplicates",
    "is_clip_name",
    "list_labelled",
    "load_photos",
    "open_source",
    "read_captioned",
    "read_labelled",
    "split_grouped",
]
