"""Errors a user can act on: one line that says what, why and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "BundleError",
    "ClipharError",
    "DataError",
    "MediaError",
    "UsageError",
    "naming",
    "one_line",
    "printable",
    "reason_of",
]

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


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


def reason_of(error: Exception) -> str:
    """What another library's error says, in one line of 200 characters at most; its class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(path: str) -> str:
    """The path with bytes that are no UTF-8 spelled out, as every output and file can take it."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """The text with control characters spelled out: a file's name may hold tabs, line breaks, a terminal's commands.

    Also those that turn the direction of what follows: they would show a name, and what stands behind it, as another.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), printable(text))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file, as that of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
