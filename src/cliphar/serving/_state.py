"""What a service was told and taught, in files that outlive it and that its workers share."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from cliphar.bundle import write_whole
from cliphar.errors import ClipharError, MediaError, UsageError
from cliphar.labels import clean_labels, vocabularies
from cliphar.media import ImageLike
from cliphar.recognizer import Lesson, Recognizer, taught_key

__all__ = ["Stamp", "State", "stamp"]

Stamp = tuple[int, int, int]


class State:
    """Named vocabularies and taught actions under one directory. Safe to share between threads.

    Files are replaced whole; before each use it is compared whether they were, so several workers agree. What was
    taught to a model is of no use to another, not even to one of the same name, so each has a file of its own.
    """

    def __init__(self, directory: Path, recognizer: Recognizer) -> None:
        self._vocabularies = directory / "vocabularies.json"
        name = recognizer.bundle.info.name
        self._taught = directory / f"taught-{name}-{taught_key(recognizer.bundle)[:12]}.safetensors"
        others = [file.name for file in directory.glob(f"taught-{name}-{'[0-9a-f]' * 12}.safetensors")]
        if others and self._taught.name not in others:
            structlog.get_logger().warning("taught to another model of this name, not used", files=others)
        self._recognizer = recognizer
        self._seen: dict[Path, Stamp] = {}
        self._named: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()
        self.refresh()

    def is_stale(self) -> bool:
        """Whether another worker wrote something; quick, and waits for no lock."""
        return any(stamp(path) not in (None, self._seen.get(path)) for path in (self._vocabularies, self._taught))

    def refresh(self, *, again: bool = False) -> None:
        """Take in what another worker wrote; ``again``, what was taken in too.

        Raises:
            ClipharError: a file is damaged.
        """
        with self._lock:
            if again:
                self._seen.clear()
            for path, read in ((self._vocabularies, self._read_vocabularies), (self._taught, self._read_taught)):
                found = stamp(path)
                if found is not None and found != self._seen.get(path):
                    try:
                        read()
                    except ClipharError as error:  # an answer tells it, which must show no path
                        raise ClipharError(str(error).replace(f"{path.parent}{os.sep}", "")) from error
                    finally:
                        self._seen[path] = found  # not before, or a request meanwhile would go on with the old

    def _read_vocabularies(self) -> None:
        try:
            content = json.loads(self._vocabularies.read_text(encoding="utf-8"))
            self._named = {name: clean_labels(labels) for name, labels in content.items()}
        except (OSError, ValueError, AttributeError, TypeError, UsageError) as error:
            raise ClipharError(
                f"vocabularies.json in the state directory cannot be used: {error}; mend it or remove it"
            ) from error

    def _read_taught(self) -> None:
        self._recognizer.load_taught(self._taught, replace=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is read, changed and written here is not written by another thread or worker meanwhile.

        Raises:
            ClipharError: nothing can be written there, or a file is damaged.
        """
        directory = self._vocabularies.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.refresh(again=True)  # a damaged file is refused again: it can be mended, if not written over
                yield
        except OSError as error:
            raise ClipharError(
                f"cannot keep this: the state directory cannot be written to ({error.strerror}); set CLIPHAR_STATE"
            ) from error

    @property
    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """The ready lists and those that were put here, by name."""
        return vocabularies() | self._named

    def put_vocabulary(self, name: str, labels: tuple[str, ...]) -> None:
        """Keep a list of labels under a name; UsageError if that would be a list of labels itself."""
        if "," in name:
            raise UsageError(f"'{name}' reads as a list of labels; give the vocabulary a name without commas")
        with self._writing():
            self._write_vocabularies(self._named | {name: clean_labels(labels)})

    def delete_vocabulary(self, name: str) -> None:
        """Drop a list that was put here; UsageError if there is none."""
        with self._writing():
            if name not in self._named:
                raise UsageError(f"no vocabulary '{name}' was put here; there are: {', '.join(self._named) or 'none'}")
            self._write_vocabularies({key: labels for key, labels in self._named.items() if key != name})

    def teach(self, name: str, photos: Iterable[ImageLike | MediaError]) -> Lesson:
        """Teach an action and keep it."""
        with self._learning() as learner:
            return learner.teach(name, photos)

    def forget(self, name: str) -> None:
        """Forget a taught action; UsageError if it was not taught."""
        with self._learning() as learner:
            learner.forget(name)

    @contextmanager
    def _learning(self) -> Iterator[Recognizer]:
        """A copy to teach: all know what it learns once that is kept, and nobody does if it cannot be."""
        with self._writing():
            learner = self._recognizer.fork()
            yield learner
            learner.save_taught(self._taught)
            self.refresh()

    def _write_vocabularies(self, named: dict[str, tuple[str, ...]]) -> None:
        write_whole(self._vocabularies, json.dumps(named, ensure_ascii=False, indent=1).encode())
        self.refresh()


def stamp(path: Path) -> Stamp | None:
    """What differs after each writing of a file, though two may fall into one tick of the file system's clock."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
