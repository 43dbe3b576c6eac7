"""The files in a folder, as everything that takes a folder sees them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["files_in"]


def files_in(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its subfolders, by name.

    Names that begin with a dot are passed over: a tool put them there for itself, as ``.git`` or a Mac's ``._a.jpg``.
    A link to a folder is followed, unless it leads back to one that it is in. What cannot be opened, such as a link to
    nothing or a folder that may not be entered, is given as a file is, for whoever opens it to report.
    """
    return _inside(folder, (folder.resolve(),))


def _inside(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
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
