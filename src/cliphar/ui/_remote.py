"""A service that answers over HTTP."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from cliphar.bundle import Metrics
from cliphar.client import Client
from cliphar.errors import ClipharError, MediaError, UsageError
from cliphar.labels import clean_labels
from cliphar.recognizer import Lesson, Prediction, Score
from cliphar.timeline import Progress, Segment, Timeline
from cliphar.ui._backend import About, Photo, Watch
from cliphar.ui._launch import api_key

__all__ = ["RemoteBackend"]

_TOP = 1000
_FRESH_S = 5.0
_ANSWER_S = 30.0  # for a camera's frame


class RemoteBackend:
    """A :class:`Backend` that asks ``cliphar serve``; what is taught is known to all who ask the same service."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._key = api_key()
        self._client = Client(self._url, api_key=self._key)
        self._trial: str | None = None
        self._told: dict[str, Any] = {}
        self._told_at = -_FRESH_S
        try:
            self._model()
        except ClipharError as error:
            self.close()
            if not isinstance(error, UsageError):
                raise
            raise UsageError(  # the key is missing or wrong
                f"{self._client.url} refuses this page: {error}; who starts the page gives it a key in "
                "CLIPHAR_API_KEY, or in the file that CLIPHAR_API_KEY_FILE names"
            ) from error

    def close(self) -> None:
        """Let the connections go."""
        self._client.close()

    def _model(self) -> dict[str, Any]:
        if time.monotonic() - self._told_at > _FRESH_S:
            if (key := api_key()) != self._key:  # there is another in its file
                self.close()
                self._key, self._client = key, Client(self._url, api_key=key)
            self._told, self._told_at = self._client.model(), time.monotonic()
        return self._told

    @property
    def where(self) -> str:
        """The model and the address."""
        return f"{self._model()['name']} at `{self._client.url}`"

    @property
    def labels(self) -> tuple[str, ...]:
        """Trained, then taught."""
        return tuple(self._model()["labels"])

    @property
    def taught(self) -> dict[str, int]:
        """Taught to the service and kept."""
        taught: dict[str, int] = self._model()["taught"]
        return {name: photos for name, photos in taught.items() if name != self._trial}

    def about(self) -> About:
        """As the service says."""
        told = self._client.model_card(self._model()["name"])
        metrics = {name: Metrics(**one) for name, one in told["metrics"].items()}
        return About(told["name"], told["runtime"], metrics, told["card"], told["evaluation"])

    def answer(self, photos: Sequence[Photo], labels: Sequence[str], coverage: float) -> list[Prediction | MediaError]:
        """As the service answers."""
        return self._client.predict([photo.data for photo in photos], labels, top_k=_TOP, coverage=coverage)

    def video(self, clip: bytes, labels: Sequence[str], coverage: float) -> Iterator[Progress | Segment | Timeline]:
        """Read by the service."""
        for line in self._client.video(clip, labels, coverage=coverage):
            if "progress" in line:
                yield Progress(**line["progress"])
            elif "segment" in line:
                yield Segment.from_dict(line["segment"])
            else:
                yield Timeline.from_dict(line["timeline"])

    def watch(self, labels: Sequence[str]) -> Watch:
        """Over a WebSocket, whose answers the service smooths."""
        return _Watch(self._url, self._client.url, labels)

    def teach(self, name: str, photos: Sequence[Photo]) -> Lesson:
        """The service knows it at once; to discard it is to have the service forget it."""
        if self._trial:
            self.discard()
        (label,) = clean_labels([name])
        if there := [one for one in self.taught if one.casefold() == label.casefold()]:  # as the service compares names
            raise UsageError(f"'{there[0]}' was taught already; forget it first, or choose another name")
        told = self._client.teach(name, [photo.data for photo in photos])
        self._trial, self._told_at = told["name"], -_FRESH_S
        return Lesson(
            told["name"],
            told["photos"],
            tuple(MediaError(reason) for reason in told["refused"]),
            told["recall"],
            tuple(Score(other["label"], other["score"]) for other in told["confused_with"]),
        )

    def keep(self) -> None:
        """It is known already, unless another had it forgotten."""
        self._trial, self._told_at = None, -_FRESH_S

    def discard(self) -> None:
        """The service forgets it."""
        if self._trial:
            trial, self._trial = self._trial, None
            self.forget(trial)

    def forget(self, name: str) -> None:
        """For all who ask this service."""
        self._told_at = -_FRESH_S  # also where it is refused: another may have had it forgotten
        self._client.forget(name)


class _Watch:
    """One camera's connection: a frame out, its answer in, in turns."""

    def __init__(self, url: str, shown: str, labels: Sequence[str]) -> None:
        self._where = f"ws{shown.removeprefix('http')}/v1/stream"
        # the empty one makes a single label a list, not a vocabulary's name
        self._url = f"ws{url.removeprefix('http')}/v1/stream?{urlencode({'labels': [*labels, '']}, doseq=True)}"
        self._header = ("X-API-Key", "") if "@" in url else ("Authorization", "Bearer ")  # as the client does
        self._open = ExitStack()
        self._socket: ClientConnection | None = None

    def close(self) -> None:
        """Hang up; the next frame connects anew."""
        self._socket = None
        with suppress(OSError, WebSocketException):
            self._open.close()

    def __call__(self, frame: NDArray[np.uint8]) -> Prediction:
        """A frame's answer."""
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=90)
        try:
            if self._socket is None:
                name, kind = self._header
                headers = {name: f"{kind}{key}"} if (key := api_key()) else {}
                self._socket = self._open.enter_context(connect(self._url, additional_headers=headers))
            with suppress(ConnectionClosed):  # what was asked is refused: the reason has come already
                self._socket.send(buffer.getvalue())
            told = json.loads(self._socket.recv(_ANSWER_S))
        except (OSError, WebSocketException) as error:  # a TimeoutError is an OSError
            self.close()
            if isinstance(error, InvalidStatus) and "problem+json" in error.response.headers.get("Content-Type", ""):
                why = json.loads(error.response.body)["detail"]
                raise ClipharError(f"{self._where} refuses the camera: {why}; the page goes on trying") from error
            raise ClipharError(
                f"no answer from {self._where} ({error or type(error).__name__}); look whether 'cliphar serve' is "
                "running there and can be reached: the page goes on trying"
            ) from error
        if "frame" not in told:
            self.close()
        if "error" in told:
            raise ClipharError(told["error"])
        return Prediction.from_dict(told)
