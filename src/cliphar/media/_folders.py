"""The files in a folder, as everything that takes a folder sees them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["files_in", "is_hidden"]

_SYSTEM = {"lost+found", "System Volume Information", "$RECYCLE.BIN"}  # at the top of disks; closed to most


def is_hidden(name: str) -> bool:
    """Whether a relative path is of what a tool or the system put there for itself: .git/a.jpg, a Mac's ._a.jpg."""
    return any(part.startswith(".") or part in _SYSTEM for part in PurePosixPath(name).parts)


def files_in(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its subfolders, by name.

    What :func:`is_hidden` names is passed over. A link to a folder is followed, unless it leads back to one that it is
    in. What cannot be opened, such as a link to nothing or a folder that may not be entered, is given as a file is, for
    whoever opens it to report.
    """
    return _inside(folder, (folder.resolve(),))


def _inside(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError:
        yield folder
        return
    for entry in entries:
        mode = _mode(entry)
        if stat.S_ISREG(mode):
            yield entry
        elif stat.S_ISDIR(mode):
            real = entry.resolve()
            if not any(one.is_relative_to(real) for one in above):
                yield from _inside(entry, (*above, real))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return stat.S_IFREG
