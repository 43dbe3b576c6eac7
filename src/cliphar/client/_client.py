"""Calls of the HTTP API. A refusal is a ClipharError with the service's own words."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import httpx
import numpy as np
from numpy.typing import NDArray

from cliphar.errors import ClipharError, MediaError, UsageError
from cliphar.labels import clean_labels
from cliphar.media import several
from cliphar.recognizer import Prediction

__all__ = ["AsyncClient", "Client"]

Photo = bytes | str | PathLike[str]
Photos = Iterable[Photo] | Photo
Labels = Sequence[str] | str | None
Rate = float | None
Answer = Prediction | MediaError
Embedding = NDArray[np.float32] | MediaError
_Part = list[bytes | MediaError]
_Files = list[tuple[str, tuple[str, bytes, str]]]
H = TypeVar("H")
_Outcome = httpx.Response | httpx.RequestError
_LONGEST_PAUSE_S = 5.0
# what is asked of photos: the rows of an answer, and how one is read
_ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "/v1/predict": ("predictions", Prediction.from_dict),
    "/v1/embed": ("embeddings", lambda row: np.array(row["embedding"], np.float32)),
}
_CALL_PHOTOS, _CALL_BYTES = 16, 48 * 2**20  # of a request; if that is too much, halves are sent


class _TooLargeError(ClipharError):
    """A request is larger than the service, or a proxy before it, takes."""


class _Calls(Generic[H]):
    """What both clients send and how they read answers."""

    _open: Callable[..., H]

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 60.0, retry_s: float = 15.0) -> None:
        try:
            address = httpx.URL(url.rstrip("/") if url.startswith(("http://", "https://")) else "")
        except httpx.InvalidURL:
            address = httpx.URL()
        if not address.host:
            raise UsageError(f"{url!r} is not a service's address; one is like http://127.0.0.1:8000")
        self.url, self._retry_s = str(address.copy_with(userinfo=b"")), retry_s  # others see it: without a password
        if api_key and not api_key.strip().isprintable():
            raise UsageError("the API key has a line break or another sign that no header takes")
        # as bytes: it may have letters beyond ASCII; an address with a password takes Authorization for that
        name, kind = ("X-API-Key", "") if address.userinfo else ("Authorization", "Bearer ")
        headers = {name: f"{kind}{api_key.strip()}".encode()} if api_key else {}
        try:
            timeout = httpx.Timeout(timeout_s, pool=None)  # to wait for a connection is no failure
            self._http = self._open(base_url=address, timeout=timeout, headers=headers)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            reason = f"the proxy that the environment names cannot be used: {error}"
            raise UsageError(f"{reason}; see HTTP_PROXY, HTTPS_PROXY and ALL_PROXY") from error

    @staticmethod
    def _path(kind: str, name: str) -> str:
        if "/" in name or not name.strip(" ."):  # no path leads there, however quoted
            raise UsageError(f"{name!r} cannot be a name here: write it in words, without a slash")
        return f"/v1/{kind}/{quote(name, safe='')}"

    @staticmethod
    def _photos(contents: Iterable[bytes | MediaError]) -> _Files:
        known = (one for one in contents if isinstance(one, bytes))
        return [("images", (f"{i}", one, "application/octet-stream")) for i, one in enumerate(known)]

    def _lesson(self, name: str, photos: Photos) -> _Files:
        files = self._photos(map(_read, several(photos)))
        if not files:
            raise UsageError(f"no photos to teach '{name}' from; give some, 8 or more are good")
        return files

    def _pause_s(self, method: str, path: str, outcome: _Outcome, tries: int, since: float) -> float | None:
        """How long to wait before trying again; None if there is no use."""
        # a little chance, so that callers who were refused together do not come back together
        pause = min(_LONGEST_PAUSE_S, 0.1 * 2 ** min(tries, 9)) * random.uniform(0.5, 1)  # noqa: S311 - no secret
        if isinstance(outcome, httpx.Response):
            if outcome.status_code not in (429, 503):
                return None
            told = outcome.headers.get("Retry-After", "")
            pause += float(told) if told.isdecimal() else 0.0
        else:
            # what may have been done when the connection broke is asked again only if twice is as good as once
            harmless = isinstance(outcome, httpx.ConnectError) or method in ("GET", "PUT") or path in _ROWS
            if isinstance(outcome, httpx.TimeoutException | httpx.DecodingError) or not harmless:
                return None
        return pause if time.monotonic() - since + pause <= self._retry_s else None

    def _checked(self, outcome: _Outcome) -> httpx.Response:
        if isinstance(outcome, httpx.RequestError):
            reason = f"no answer from {self.url}: {str(outcome) or type(outcome).__name__}"
            raise ClipharError(f"{reason}; is 'cliphar serve' running?{self._way}") from outcome
        if outcome.is_success:
            return outcome
        if outcome.has_redirect_location:
            raise UsageError(f"{self.url} sends on to {outcome.headers['Location']}; give that address")
        if outcome.status_code == 413 and "json" not in outcome.headers.get("Content-Type", ""):
            raise _TooLargeError(f"larger than a proxy before {self.url} takes")
        told = self._content(outcome)
        if any(rows in told for rows, _ in _ROWS.values()):  # no photo could be read; why, of each
            return outcome
        known = dict.fromkeys((401, 403, 404, 422), UsageError) | {413: _TooLargeError}
        kind: type[ClipharError] = known.get(outcome.status_code, ClipharError)
        raise kind(str(told.get("detail") or f"{self.url} answered {outcome.status_code}"))

    def _content(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == 204:
            return {}
        try:
            told: dict[str, Any] = response.json()
            if not isinstance(told, list if response.is_success and response.request.method == "PUT" else dict):
                raise TypeError
        except (TypeError, ValueError, RecursionError) as error:
            raise self._foreign(response.status_code) from error
        return told

    def _model(self, content: dict[str, Any]) -> dict[str, Any]:
        try:
            model: dict[str, Any] = content["models"][0]
        except (LookupError, TypeError) as error:
            raise self._foreign() from error
        return model

    def _foreign(self, status: int = 200) -> ClipharError:
        return ClipharError(f"{self.url} answered {status}, but not as cliphar does; is the address right?{self._way}")

    @property
    def _way(self) -> str:
        """A hint where the environment puts a proxy before the service: that may be what does not answer."""
        scheme, found = self.url.partition(":")[0], getproxies()
        host = httpx.URL(self.url).host
        if not (found.get(scheme) or found.get("all")) or proxy_bypass(host):
            return ""
        return f" The way there is the proxy of {scheme.upper()}_PROXY or ALL_PROXY; NO_PROXY={host} goes past it"

    def _answers(self, path: str, part: _Part, content: dict[str, Any]) -> Iterator[Any]:
        rows, read = _ROWS[path]
        try:
            known = (MediaError(one["error"]) if "error" in one else read(one) for one in content.get(rows) or ())
            for photo in part:
                yield photo if isinstance(photo, MediaError) else next(known)
        except (LookupError, TypeError, ValueError, StopIteration) as error:
            raise self._foreign() from error


class Client(_Calls[httpx.Client]):
    """Plain calls; safe to share between threads.

    Args:
        url: the service's address, such as ``http://127.0.0.1:8000``; ``USER:PASSWORD@`` before its host is a proxy's.
        api_key: for a service that asks for one.
        timeout_s: for each try.
        retry_s: how long to try a request anew when the service is busy (429, 503: after as long as it says), cannot
            be reached or breaks the connection, as when it is started anew.

    Raises:
        UsageError: ``url`` is not an address, or the environment names a proxy of an unknown kind. Every call: a
            ClipharError with one line when refused or nothing answers.
    """

    _open = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def _send(self, method: str, path: str, *, stream: bool = False, **body: Any) -> httpx.Response:
        since, tries = time.monotonic(), 0
        while True:
            outcome: _Outcome
            try:
                outcome = self._http.send(self._http.build_request(method, path, **body), stream=stream)
                if not outcome.is_success:
                    outcome.read()
            except httpx.InvalidURL as error:  # a clip's labels; httpx takes 64 KiB
                raise UsageError("labels are too long for one request; give fewer, or a vocabulary's name") from error
            except httpx.RequestError as error:
                outcome = error
            if (pause := self._pause_s(method, path, outcome, tries, since)) is None:
                return self._checked(outcome)
            time.sleep(pause)
            tries += 1

    def _call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        return self._content(self._send(method, path, **body))

    def predict(self, photos: Photos, labels: Labels = None, *, top_k: int = 5, coverage: float = 0.9) -> list[Answer]:
        """One answer a photo (encoded bytes or a path; one or any number), or its MediaError.

        ``labels`` may name a list. Photos are read and sent a few at a time.
        """
        data = {"top_k": str(top_k), "coverage": str(coverage)} | _labels(labels)
        return [answer for part in _parts(photos) for answer in self._ask("/v1/predict", part, data)]

    def embed(self, photos: Photos) -> list[Embedding]:
        """Each photo as float32 [D] of unit length, or its MediaError; photos are given as to ``predict``."""
        return [answer for part in _parts(photos) for answer in self._ask("/v1/embed", part, {})]

    def _ask(self, path: str, part: _Part, data: dict[str, Any]) -> list[Any]:
        files = self._photos(part)
        try:
            told = self._call("POST", path, files=files, data=data) if files else {}
        except _TooLargeError as error:
            if len(files) == 1:
                return [*self._answers(path, part, {_ROWS[path][0]: [{"error": str(error)}]})]
            half = len(part) // 2
            return self._ask(path, part[:half], data) + self._ask(path, part[half:], data)
        return [*self._answers(path, part, told)]

    def video(
        self, clip: Photo, labels: Labels = None, *, coverage: float = 0.9, multi_label: bool = False, fps: Rate = None
    ) -> Iterator[dict[str, Any]]:
        """A clip's lines while the service reads it: ``progress``, each ``segment``, at last the ``timeline``."""
        content = _read(clip)
        query = {"coverage": str(coverage), "multi_label": multi_label} | _labels(labels)
        query |= {} if fps is None else {"fps": fps}
        with closing(self._send("POST", "/v1/video", stream=True, params=query, files={"video": content})) as response:
            told: dict[str, Any] = {}
            try:
                for line in response.iter_lines():
                    one = json.loads(line)
                    if "error" in one:
                        raise MediaError(one["error"])
                    yield (told := one)
            except httpx.RequestError as error:
                self._checked(error)
            except (TypeError, ValueError) as error:  # no JSON, or a line cut short
                if not told:
                    raise self._foreign() from error
            if "timeline" not in told:  # some proxies end well an answer that the service broke off
                raise ClipharError(f"the answer of {self.url} ends before the timeline; send the clip again")

    def model(self) -> dict[str, Any]:
        """The model that answers: name, labels, what was taught, metrics."""
        return self._model(self._call("GET", "/v1/models"))

    def model_card(self, name: str) -> dict[str, Any]:
        """The same of the model of that name, with its ``card`` in Markdown and its ``evaluation`` or None."""
        return self._call("GET", self._path("models", name))

    def vocabularies(self) -> dict[str, list[str]]:
        """Named lists of labels."""
        return self._call("GET", "/v1/labels")

    def put_vocabulary(self, name: str, labels: Sequence[str]) -> None:
        """Keep a list of labels under a name."""
        self._call("PUT", self._path("labels", name), json=clean_labels(labels))

    def delete_vocabulary(self, name: str) -> None:
        """Delete the list of that name."""
        self._call("DELETE", self._path("labels", name))

    def teach(self, name: str, photos: Photos) -> dict[str, Any]:
        """Teach an action; how well it works, as ``Lesson.to_dict`` has it."""
        return self._call("POST", self._path("actions", name), files=self._lesson(name, photos))

    def forget(self, name: str) -> None:
        """Forget an action that was taught."""
        self._call("DELETE", self._path("actions", name))


class AsyncClient(_Calls[httpx.AsyncClient]):
    """The same for asyncio, but for ``video``; see :class:`Client`."""

    _open = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let the connections go."""
        await self._http.aclose()

    async def _call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        since, tries = time.monotonic(), 0
        while True:
            try:
                outcome: _Outcome = await self._http.request(method, path, **body)
            except httpx.RequestError as error:
                outcome = error
            if (pause := self._pause_s(method, path, outcome, tries, since)) is None:
                return self._content(self._checked(outcome))
            await asyncio.sleep(pause)
            tries += 1

    async def predict(
        self, photos: Photos, labels: Labels = None, *, top_k: int = 5, coverage: float = 0.9
    ) -> list[Answer]:
        """See :meth:`Client.predict`."""
        data = {"top_k": str(top_k), "coverage": str(coverage)} | _labels(labels)
        return [answer for part in _parts(photos) for answer in await self._ask("/v1/predict", part, data)]

    async def embed(self, photos: Photos) -> list[Embedding]:
        """See :meth:`Client.embed`."""
        return [answer for part in _parts(photos) for answer in await self._ask("/v1/embed", part, {})]

    async def _ask(self, path: str, part: _Part, data: dict[str, Any]) -> list[Any]:
        files = self._photos(part)
        try:
            told = await self._call("POST", path, files=files, data=data) if files else {}
        except _TooLargeError as error:
            if len(files) == 1:
                return [*self._answers(path, part, {_ROWS[path][0]: [{"error": str(error)}]})]
            half = len(part) // 2
            return await self._ask(path, part[:half], data) + await self._ask(path, part[half:], data)
        return [*self._answers(path, part, told)]

    async def model(self) -> dict[str, Any]:
        """See :meth:`Client.model`."""
        return self._model(await self._call("GET", "/v1/models"))

    async def model_card(self, name: str) -> dict[str, Any]:
        """See :meth:`Client.model_card`."""
        return await self._call("GET", self._path("models", name))

    async def vocabularies(self) -> dict[str, list[str]]:
        """Named lists of labels."""
        return await self._call("GET", "/v1/labels")

    async def put_vocabulary(self, name: str, labels: Sequence[str]) -> None:
        """Keep a list of labels under a name."""
        await self._call("PUT", self._path("labels", name), json=clean_labels(labels))

    async def delete_vocabulary(self, name: str) -> None:
        """Delete the list of that name."""
        await self._call("DELETE", self._path("labels", name))

    async def teach(self, name: str, photos: Photos) -> dict[str, Any]:
        """See :meth:`Client.teach`."""
        return await self._call("POST", self._path("actions", name), files=self._lesson(name, photos))

    async def forget(self, name: str) -> None:
        """Forget an action that was taught."""
        await self._call("DELETE", self._path("actions", name))


def _labels(labels: Labels) -> dict[str, Any]:
    if labels is None or isinstance(labels, str):
        return {"labels": labels} if labels else {}
    return {"labels": [*labels, "", ""]}  # so one is a list, not a vocabulary's name, and none is not the model's own


def _read(photo: Photo) -> bytes:
    if isinstance(photo, bytes):
        return photo
    try:
        return Path(photo).read_bytes()
    except OSError as error:
        raise MediaError(f"{photo} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in it
        raise MediaError(f"{photo!r} cannot be read: {error}") from error
    except TypeError as error:
        raise MediaError(f"cannot send {type(photo).__name__}; give encoded bytes or a path") from error


def _parts(photos: Photos) -> Iterator[_Part]:
    part, size = _Part(), 0
    for photo in several(photos):
        try:
            one: bytes | MediaError = _read(photo)
        except MediaError as error:
            one = error
        more = len(one) if isinstance(one, bytes) else 0
        if part and (len(part) == _CALL_PHOTOS or size + more > _CALL_BYTES):
            yield part
            part, size = [], 0
        part.append(one)
        size += more
    if part:
        yield part
