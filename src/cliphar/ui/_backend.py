"""Who answers: the recogniser in this process, or a service. The page knows only the protocol."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cliphar.errors import MediaError
from cliphar.recognizer import Prediction, Recognizer, load, to_predictions

__all__ = ["Backend", "LocalBackend", "Photo", "connect"]

_KEPT_EMBEDDINGS = 1000
_TOP = 1000


@dataclass(frozen=True)
class Photo:
    """A photo of the session: its encoded bytes and their sha256, and a small JPEG to show."""

    name: str
    data: bytes
    digest: str
    thumbnail: bytes


class Backend(Protocol):
    """What the page asks for. One belongs to one session."""

    where: str

    def answer(self, photos: Sequence[Photo], labels: Sequence[str], coverage: float) -> list[Prediction | MediaError]:
        """One answer a photo, with every label in ``top``; a photo that is refused gets its error."""
        ...


@functools.lru_cache(maxsize=2)
def _shared(model: str | None) -> Recognizer:
    return load(model)


def connect(model: str | None) -> Backend:
    """A backend for a new session: the service at CLIPHAR_API_URL, else the model in this process."""
    return LocalBackend(_shared(model))


class LocalBackend:
    """The recogniser in this process. The model is shared; what is taught and remembered belongs to the session."""

    def __init__(self, shared: Recognizer) -> None:
        self.recognizer = Recognizer(shared.bundle, shared.runtime)
        self.where = f"{shared.bundle.info.name} in this page's own process, on {shared.runtime.name}"
        self._embeddings: OrderedDict[str, NDArray[np.float32] | MediaError] = OrderedDict()

    def answer(self, photos: Sequence[Photo], labels: Sequence[str], coverage: float) -> list[Prediction | MediaError]:
        """See :class:`Backend`. A photo is embedded once, so that other labels cost only a product of matrices."""
        found = self._embed(photos)
        good = [one for one in found if not isinstance(one, MediaError)]
        if not good:
            return [one for one in found if isinstance(one, MediaError)]
        chosen = tuple(labels)
        cosines = np.stack(good) @ self.recognizer.embed_labels(chosen).T
        answers = iter(to_predictions(cosines, chosen, self.recognizer.calibration(chosen), _TOP, coverage))
        return [one if isinstance(one, MediaError) else next(answers) for one in found]

    def _embed(self, photos: Sequence[Photo]) -> list[NDArray[np.float32] | MediaError]:
        new = {photo.digest: photo.data for photo in photos if photo.digest not in self._embeddings}
        for digest, embedding in zip(new, self.recognizer.embed_images(new.values()), strict=True):
            self._embeddings[digest] = embedding
        found = [self._embeddings[photo.digest] for photo in photos]
        while len(self._embeddings) > _KEPT_EMBEDDINGS:
            self._embeddings.popitem(last=False)
        return found
