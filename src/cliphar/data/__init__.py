"""Labelled and captioned photos and clips: reading them, finding near-duplicates, splitting, caching."""

from cliphar.data._cache import PhotoSet, load_photos
from cliphar.data._check import DataReport, check_photos, doubtful_labels, photo_stats
from cliphar.data._clips import clip_frames, embed_clips
from cliphar.data._copy import copy_parts
from cliphar.data._duplicates import difference_hash, group_duplicates
from cliphar.data._readers import SPLITS, PhotoSource, open_source
from cliphar.data._sources import (
    Photo,
    labelled_keys,
    list_labelled,
    open_tar,
    read_captioned,
    read_labelled,
    stream_labelled,
)
from cliphar.data._split import assign_parts, split_grouped

__all__ = [
    "SPLITS",
    "DataReport",
    "Photo",
    "PhotoSet",
    "PhotoSource",
    "assign_parts",
    "check_photos",
    "clip_frames",
    "copy_parts",
    "difference_hash",
    "doubtful_labels",
    "embed_clips",
    "group_duplicates",
    "labelled_keys",
    "list_labelled",
    "load_photos",
    "open_source",
    "open_tar",
    "photo_stats",
    "read_captioned",
    "read_labelled",
    "split_grouped",
    "stream_labelled",
]
