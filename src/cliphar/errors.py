"""Errors a user can act on: one line that says what, why and what to do."""

from __future__ import annotations

__all__ = ["BundleError", "ClipharError", "DataError", "MediaError", "UsageError"]


class ClipharError(Exception):
    """Base of every error that cliphar raises on purpose."""


class UsageError(ClipharError):
    """The call itself is wrong: an unknown name, an impossible option, an empty label list."""


class BundleError(ClipharError):
    """A bundle is missing, damaged, altered or from a newer cliphar."""


class MediaError(ClipharError):
    """An image cannot be read or is refused."""


class DataError(ClipharError):
    """A data set is missing, empty or malformed."""
