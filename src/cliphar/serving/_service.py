"""The parts of a running service, made at its start and handed to every route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import numpy as np
import structlog
from fastapi import Depends, Request
from numpy.typing import NDArray
from PIL import Image

from cliphar.errors import ClipharError, MediaError
from cliphar.labels import MAX_LABEL_LENGTH, clean_labels
from cliphar.media import decode_image, to_square
from cliphar.recognizer import Lesson, Prediction, Recognizer, load
from cliphar.runtime import cpu_quota
from cliphar.serving._engine import Engine
from cliphar.serving._metrics import Metrics
from cliphar.serving._problems import ProblemError
from cliphar.serving._settings import Settings
from cliphar.serving._state import State

__all__ = ["Service", "TheService"]

T = TypeVar("T")


@dataclass
class Service:
    """A recogniser behind a batching engine, with what it was told and taught."""

    settings: Settings
    recognizer: Recognizer
    engine: Engine
    state: State
    metrics: Metrics
    prepare: Callable[[bytes], NDArray[np.uint8]]
    """Encoded bytes -> uint8 [S,S,3]; raises MediaError."""
    ready: bool = False
    users: int = 0
    """Requests that are being answered; while there are any, the engine stays open."""
    changes: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "changes"))

    @classmethod
    def start(cls, settings: Settings, metrics: Metrics | None = None) -> Service:
        """Load the model, verify it and run it once; ``metrics`` are those of the service that this one replaces.

        Raises:
            ClipharError: the model cannot be loaded.
        """
        recognizer = load(
            settings.model, runtime=settings.runtime, provider=settings.provider, threads=settings.threads
        )
        spec, metrics = recognizer.bundle.info.image, metrics or Metrics()
        # Pillow's own bound, twice that, must not be below ours
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, settings.max_pixels)

        def prepare(content: bytes) -> NDArray[np.uint8]:
            image = decode_image(content, min_side=spec.size, max_pixels=settings.max_pixels)
            return to_square(image, spec.size, spec.max_aspect)

        state = State(settings.state, recognizer)
        blank = np.zeros((spec.size, spec.size, 3), np.uint8)
        for photos in (1, max(2, cpu_quota())):  # a runtime makes ready for many when it first meets them
            recognizer.predict([blank] * photos, ["standing", "anything else"])
        engine = Engine(
            prepare,
            recognizer.runtime.encode_images,
            queue_size=settings.queue_size,
            max_batch=settings.max_batch,
            decoders=cpu_quota(),
            encode_lane=recognizer.runtime.encode_lane,
            lanes=recognizer.runtime.lanes,
            keep=settings.keep_photos,
            observe=metrics.observe,
        )
        metrics.watch(engine, recognizer)
        return cls(settings, recognizer, engine, state, metrics, prepare, ready=True)

    async def refresh(self) -> None:
        """Take in what another worker was told or taught; of a damaged file the log says why, and the old goes on."""
        if self.state.is_stale():
            try:
                await asyncio.to_thread(self.state.refresh)
            except ClipharError as error:
                structlog.get_logger().error("what was known goes on", reason=str(error))

    async def change(self, do: Callable[..., T], *arguments: Any) -> T:
        """Change the state, one after another: each waits for its file, and many at once would hold all threads."""
        return await asyncio.get_running_loop().run_in_executor(self.changes, do, *arguments)

    def in_time(self) -> AbstractAsyncContextManager[None]:
        """ProblemError 503 if what is done inside takes longer than a request may."""
        return self.engine.in_time(self.settings.deadline_s)

    async def embed(
        self, contents: Sequence[bytes | MediaError], *, again: bool = True
    ) -> list[NDArray[np.float32] | MediaError]:
        """An embedding for each photo, or why it has none, which may be known before; see :meth:`Engine.embed`."""
        if not contents:
            raise ProblemError(422, "no images; give at least one")
        self.settings.check_images(len(contents))
        good = [one for one in contents if not isinstance(one, MediaError)]
        found = iter(await self.engine.embed(good, self.settings.deadline_s, again=again))
        return [one if isinstance(one, MediaError) else next(found) for one in contents]

    async def answer(
        self,
        contents: Sequence[bytes | MediaError],
        labels: Sequence[str] | str | None,
        top_k: int,
        coverage: float,
    ) -> list[Prediction | MediaError]:
        """An answer for each photo, or why it has none; ``labels`` as a text names a vocabulary or has commas."""
        async with self.in_time():  # new words take the text tower's time, whatever the photos took
            await self.refresh()
            chosen = self.labels(labels)
            found = await self.embed(contents)
            good = [one for one in found if not isinstance(one, MediaError)]
            if not good:
                return [one for one in found if isinstance(one, MediaError)]
            asked = (np.stack(good), chosen, top_k, coverage)
            # the model's own labels have their vectors already; words may need the text tower
            answers = iter(self.score(*asked) if chosen is None else await asyncio.to_thread(self.score, *asked))
        return [one if isinstance(one, MediaError) else next(answers) for one in found]

    def teach(self, name: str, photos: Sequence[bytes]) -> Lesson:
        """Teach an action from encoded photos, and keep it."""

        def read(photo: bytes) -> NDArray[np.uint8] | MediaError:
            try:
                return self.prepare(photo)
            except MediaError as error:
                return error

        return self.state.teach(name, [read(photo) for photo in photos])

    def score(
        self, embeddings: NDArray[np.float32], labels: Sequence[str] | None, top_k: int, coverage: float
    ) -> list[Prediction]:
        """Answers for embeddings, float32 [N,D]."""
        return self.recognizer.score(embeddings, labels, top_k=top_k, coverage=coverage)

    def labels(self, labels: Sequence[str] | str | None) -> tuple[str, ...] | None:
        """The words to choose from: as given, of a vocabulary, or None for the model's own."""
        if labels is None:
            return None
        size = len(labels) if isinstance(labels, str) else len(labels) + sum(map(len, labels))
        if size > (most := self.settings.max_labels * (MAX_LABEL_LENGTH + 1)):  # else to look at them takes seconds
            raise ProblemError(422, f"labels of {size:,} characters are too many; at most {most:,}")
        if isinstance(labels, str):
            labels = self.state.vocabularies.get(labels.strip()) or labels.split(",")
        chosen = clean_labels(labels)
        if len(chosen) > self.settings.max_labels:
            raise ProblemError(422, f"{len(chosen)} labels are too many; at most {self.settings.max_labels}")
        return chosen


async def _service(request: Request) -> Service:  # async, or FastAPI hands it to a thread
    service: Service = request.state.service  # the one that answers this request, though the model change meanwhile
    return service


TheService = Annotated[Service, Depends(_service)]
