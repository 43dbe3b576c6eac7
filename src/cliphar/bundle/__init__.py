"""Read, verify and write bundles: the one artefact that training makes and serving loads."""

from cliphar.bundle._io import (
    BUNDLE_JSON,
    Bundle,
    alone,
    check_place,
    read_bundle,
    sha256_file,
    whole_file,
    write_bundle,
    write_whole,
)
from cliphar.bundle._pull import PULLS, download_wheel, fetch_teacher, pull
from cliphar.bundle._schema import (
    SCHEMA_VERSION,
    BundleInfo,
    Calibration,
    FileInfo,
    ImageSpec,
    Metrics,
    Provenance,
    Source,
    TextSpec,
    VideoSpec,
)
from cliphar.bundle._store import DEFAULT_MODEL, StoredModel, find_bundle, list_models, packaged, store

__all__ = [
    "BUNDLE_JSON",
    "DEFAULT_MODEL",
    "PULLS",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleInfo",
    "Calibration",
    "FileInfo",
    "ImageSpec",
    "Metrics",
    "Provenance",
    "Source",
    "StoredModel",
    "TextSpec",
    "VideoSpec",
    "alone",
    "check_place",
    "download_wheel",
    "fetch_teacher",
    "find_bundle",
    "list_models",
    "packaged",
    "pull",
    "read_bundle",
    "sha256_file",
    "store",
    "whole_file",
    "write_bundle",
    "write_whole",
]
