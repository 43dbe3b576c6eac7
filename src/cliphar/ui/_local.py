"""The recogniser in the page's own process."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import find_bundle
from cliphar.errors import MediaError
from cliphar.evaluation import bundled_evaluation, model_card
from cliphar.labels import vocabularies
from cliphar.recognizer import Lesson, Prediction, Recognizer
from cliphar.runtime import Runtime, choose_runtime, load_runtime
from cliphar.timeline import Live, Progress, Segment, Timeline, stream_video
from cliphar.ui._backend import About, Photo, Watch

__all__ = ["LocalBackend"]

_KEPT_EMBEDDINGS = 1000
_TOP = 1000
_PAUSE_S = 0.1
_LOADING = threading.Lock()  # visitors who come together load a model once


@functools.lru_cache(maxsize=2)
def _load(model: str | None) -> tuple[Recognizer, str]:
    bundle = find_bundle(model)
    runtime = os.environ.get("CLIPHAR_RUNTIME") or choose_runtime(bundle).name
    recognizer = Recognizer(bundle, load_runtime(bundle, runtime))
    # a list's first words take a moment each: little by little, so that the first visitor does not wait for them
    threading.Thread(target=_embed_ready_lists, args=(recognizer,), daemon=False).start()
    return recognizer, runtime


@functools.lru_cache(maxsize=4)
def _runtime(model: Path, name: str) -> Runtime:
    return load_runtime(find_bundle(model), name)


def _embed_ready_lists(recognizer: Recognizer) -> None:
    for labels in (recognizer.labels, *vocabularies().values()):
        for label in labels:
            if not threading.main_thread().is_alive():  # the page is being stopped
                return
            recognizer.embed_labels([label, "anything"])
            time.sleep(_PAUSE_S)


class LocalBackend:
    """A :class:`Backend` whose model is shared with all sessions; what is taught belongs to the session."""

    def __init__(self, model: str | None) -> None:
        with _LOADING:
            shared, self._runtime = _load(model)
        self._recognizer = shared.fork()
        self._trial: Recognizer | None = None
        self._embeddings: OrderedDict[str, NDArray[np.float32] | MediaError] = OrderedDict()

    @property
    def where(self) -> str:
        """The model and the runtime."""
        return f"{self._recognizer.bundle.info.name} in this page's own process, on {self._recognizer.runtime.name}"

    @property
    def model(self) -> Path:
        """The bundle's directory."""
        return self._recognizer.bundle.path

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Those of the bundle."""
        return tuple(self._recognizer.bundle.runtimes)

    @property
    def runtime(self) -> str:
        """The one that answers."""
        return self._runtime

    def use_runtime(self, name: str) -> None:
        """Answer on another of ``runtimes`` from now on; what was taught stays."""
        with _LOADING:
            runtime = _runtime(self.model, name)
        self._recognizer, self._runtime = self._recognizer.fork(runtime), name
        self._trial = None
        self._embeddings.clear()

    @property
    def labels(self) -> tuple[str, ...]:
        """Trained, then taught."""
        return self._recognizer.labels

    @property
    def taught(self) -> dict[str, int]:
        """Taught in this session."""
        return self._recognizer.taught

    def about(self) -> About:
        """As the bundle says."""
        bundle = self._recognizer.bundle
        return About(
            bundle.info.name, self._runtime, bundle.info.metrics, model_card(bundle), bundled_evaluation(bundle)
        )

    def answer(self, photos: Sequence[Photo], labels: Sequence[str], coverage: float) -> list[Prediction | MediaError]:
        """A photo is embedded once, so that other labels cost only a product of matrices."""
        found = self._embed(photos)
        good = [one for one in found if not isinstance(one, MediaError)]
        if not good:
            return [one for one in found if isinstance(one, MediaError)]
        answers = iter(self._recognizer.score(np.stack(good), labels, top_k=_TOP, coverage=coverage))
        return [one if isinstance(one, MediaError) else next(answers) for one in found]

    def _embed(self, photos: Sequence[Photo]) -> list[NDArray[np.float32] | MediaError]:
        new = {photo.digest: photo.data for photo in photos if photo.digest not in self._embeddings}
        for digest, embedding in zip(new, self._recognizer.embed_images(new.values()), strict=True):
            self._embeddings[digest] = embedding
        found = [self._embeddings[photo.digest] for photo in photos]
        while len(self._embeddings) > _KEPT_EMBEDDINGS:
            self._embeddings.popitem(last=False)
        return found

    def video(self, clip: bytes, labels: Sequence[str], coverage: float) -> Iterator[Progress | Segment | Timeline]:
        """Read in this process."""
        return stream_video(self._recognizer, clip, labels, coverage=coverage)

    def watch(self, labels: Sequence[str]) -> Watch:
        """In this process."""
        return _LocalWatch(self._recognizer, tuple(labels))

    def teach(self, name: str, photos: Sequence[Photo]) -> Lesson:
        """Taught to a copy, which takes the place of the session's recogniser if it is kept."""
        trial = self._recognizer.fork()
        lesson = trial.teach(name, [photo.data for photo in photos])
        self._trial = trial
        return lesson

    def keep(self) -> None:
        """The copy takes over."""
        if self._trial:
            self._recognizer, self._trial = self._trial, None

    def discard(self) -> None:
        """The copy is dropped."""
        self._trial = None

    def forget(self, name: str) -> None:
        """In this session."""
        self._recognizer.forget(name)


class _LocalWatch:
    """Steadies answers as the service's stream does."""

    def __init__(self, recognizer: Recognizer, labels: tuple[str, ...]) -> None:
        self._recognizer, self._labels = recognizer, labels
        self._live: Live | None = None

    def __call__(self, frame: NDArray[np.uint8]) -> Prediction:
        """The answer at this frame."""
        if self._live is None:
            self._live = Live(self._recognizer, self._labels)
        return self._live.push(frame, time.monotonic()).prediction

    def close(self) -> None:
        """Begin anew."""
        self._live = None
