"""Dynamic batching: photos of all requests share the model, a bounded queue, and nobody waits for a batch to fill.

The event loop takes photos in and hands answers out; between the two, threads decode and others run the model, and
they pass work on by themselves, so that a loop that is busy refusing others does not keep the model waiting. As soon as
a lane of the model is free it takes its part of what is decoded, one photo of each request in turn, up to
``max_batch``; so the batch grows with the load, and a caller with one photo is not behind another's hundred. A photo
that is asked for twice at once is computed once, one that is asked for again soon (as by a page with other labels) is
not computed again, and one that nobody waits for any more is not computed at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cliphar.errors import MediaError
from cliphar.serving._problems import ProblemError

__all__ = ["Engine", "Observer"]

Square = NDArray[np.uint8]
Embedding = NDArray[np.float32]
Observer = Callable[[str, float], None]
"""Told (stage, seconds) of ``queue``, ``decode`` and ``model``, (``batch``, photos), (``pending``, change) and
(``kept``, photos that had been computed before). Called on several threads."""
_CLOSE_S = 5.0


@dataclass
class _Work:
    content: bytes
    key: bytes
    done: asyncio.Future[Embedding | MediaError]
    since: float
    waiters: int = 0
    square: Square | None = None


@dataclass
class _Turns:
    """Work of several callers, taken one piece of each in turn."""

    callers: OrderedDict[int, deque[_Work]] = field(default_factory=OrderedDict)

    def add(self, caller: int, work: _Work) -> None:
        self.callers.setdefault(caller, deque()).append(work)

    def __len__(self) -> int:
        return sum(map(len, self.callers.values()))

    def take(self) -> tuple[int, _Work] | None:
        while self.callers:
            caller, queue = next(iter(self.callers.items()))
            work = queue.popleft()
            if queue:
                self.callers.move_to_end(caller)
            else:
                del self.callers[caller]
            if work.waiters:
                return caller, work
        return None


class Engine:
    """Embeds photos for many callers at once. Used from one event loop.

    Args:
        prepare: encoded bytes -> uint8 [S,S,3]; raises MediaError. Called on threads.
        encode: uint8 [N,S,S,3] -> float32 [N,D]. Called on ``lanes`` threads.
        encode_lane: the same on the calling thread alone, for when there are photos for all lanes.
        queue_size: photos that may be waiting or worked on; more are refused.
        max_batch: photos the model is given at once, at most.
        decoders: photos decoded at the same time.
        lanes: batches that the model runs at the same time.
        keep: embeddings that are kept for photos asked for again, those used last; 0 keeps none.
        observe: told what took how long.
    """

    def __init__(
        self,
        prepare: Callable[[bytes], Square],
        encode: Callable[[Square], Embedding],
        *,
        queue_size: int,
        max_batch: int,
        decoders: int,
        encode_lane: Callable[[Square], Embedding] | None = None,
        lanes: int = 1,
        keep: int = 0,
        observe: Observer = lambda _stage, _value: None,
    ) -> None:
        self._prepare, self._encode, self._observe = prepare, encode, observe
        self._encode_lane, self._lanes = encode_lane or encode, lanes
        self.queue_size, self._max_batch, self._keep = queue_size, max_batch, keep
        self._shared: dict[bytes, _Work] = {}
        self._kept: OrderedDict[bytes, Embedding] = OrderedDict()
        self._callers = 0
        self._photo_s, self._finished = 0.05, 0.0
        self.pending = 0
        self._lock = threading.Lock()
        self._to_decode, self._undecoded = _Turns(), threading.Condition(self._lock)
        self._decoded, self._unencoded = _Turns(), threading.Condition(self._lock)
        self._closed = False
        self._threads = [threading.Thread(target=self._decode_all, name="decode", daemon=True) for _ in range(decoders)]
        self._threads += [threading.Thread(target=self._encode_all, name="model", daemon=True) for _ in range(lanes)]
        for thread in self._threads:
            thread.start()

    @property
    def drain_s(self) -> float:
        """About how long it takes to work off what is pending."""
        return self.pending * self._photo_s

    def check_room(self, photos: int, deadline_s: float) -> None:
        """ProblemError 503 if so many more photos have no room, or could not be answered in time; all find room where
        nothing waits."""
        if (self.pending and self.pending + photos > self.queue_size) or self.drain_s > deadline_s:
            raise ProblemError(503, "the queue is full; try again later", retry_after_s=self.drain_s)

    @asynccontextmanager
    async def in_time(self, deadline_s: float) -> AsyncIterator[None]:
        """ProblemError 503 if what is done inside takes longer."""
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except TimeoutError as error:
            raise self._too_late(deadline_s) from error

    def _too_late(self, deadline_s: float) -> ProblemError:
        detail = f"no answer within {deadline_s:g} s; try again later or send fewer photos"
        return ProblemError(503, detail, retry_after_s=self.drain_s)

    async def embed(
        self, contents: Sequence[bytes], deadline_s: float, *, again: bool = True
    ) -> list[Embedding | MediaError]:
        """An embedding for each photo, float32 [D], or its MediaError; in order.

        Args:
            contents: encoded photos.
            deadline_s: how long it may take.
            again: whether they may be asked for again; a camera's frames are not, and are not kept.

        Raises:
            ProblemError: 503 when the queue is full, the deadline passes, or the engine is closed.
        """
        if self._closed:
            raise ProblemError(503, "the model has just been changed; try again", retry_after_s=1)
        keys = [hashlib.blake2b(content, digest_size=16).digest() for content in contents]
        if new := sum(key not in self._kept for key in keys):
            self.check_room(new, deadline_s)
        self._callers += 1
        works = [self._join(self._callers, content, key) for content, key in zip(contents, keys, strict=True)]
        try:
            if works:
                _, late = await asyncio.wait([work.done for work in works], timeout=deadline_s)
                if late:
                    raise self._too_late(deadline_s)
            found = [work.done.result() for work in works]
        finally:
            for work in works:
                self._leave(work)
        if again:
            self._remember(keys, found)
        return found

    def _remember(self, keys: Sequence[bytes], found: Sequence[Embedding | MediaError]) -> None:
        for key, embedding in zip(keys, found, strict=True):
            if not isinstance(embedding, MediaError):
                if key not in self._kept:
                    self._kept[key] = embedding.copy()  # a row would keep its whole batch
                self._kept.move_to_end(key)
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)

    def _join(self, caller: int, content: bytes, key: bytes) -> _Work:
        work = self._shared.get(key)
        if work is None:
            work = _Work(content, key, asyncio.get_running_loop().create_future(), time.perf_counter(), waiters=1)
            if key in self._kept:
                self._observe("kept", 1)
                work.done.set_result(self._kept[key])
                return work
            self._shared[key] = work
            self.pending += 1
            self._observe("pending", 1)
            with self._undecoded:
                self._to_decode.add(caller, work)
                self._undecoded.notify()
        else:
            work.waiters += 1
        return work

    def _leave(self, work: _Work) -> None:
        work.waiters -= 1
        if not work.waiters and self._shared.get(work.key) is work:
            del self._shared[work.key]
            self.pending -= 1
            self._observe("pending", -1)

    def _take(self, turns: _Turns, filled: threading.Condition, most: int, takers: int = 1) -> list[tuple[int, _Work]]:
        """Up to so many pieces of work as soon as there is one, and a part for each taker; none when it is closed."""
        with filled:
            while not self._closed:
                count = min(most, -(-len(turns) // takers))
                taken = [one for _ in range(count) if (one := turns.take()) is not None]
                if taken:
                    return taken
                filled.wait()
        return []

    def _decode_all(self) -> None:
        while taken := self._take(self._to_decode, self._undecoded, 1):
            caller, work = taken[0]
            started = time.perf_counter()
            self._observe("queue", started - work.since)
            try:
                work.square = self._prepare(work.content)
            except Exception as error:
                self._deliver([work], [error])
                continue
            self._observe("decode", time.perf_counter() - started)
            with self._unencoded:
                self._decoded.add(caller, work)
                self._unencoded.notify()

    def _encode_all(self) -> None:
        while taken := self._take(self._decoded, self._unencoded, self._max_batch, self._lanes):
            batch = [work for _, work in taken]
            started = time.perf_counter()
            encode = self._encode if self.pending < self._lanes else self._encode_lane
            try:
                vectors = encode(np.stack([work.square for work in batch if work.square is not None]))
            except Exception as error:
                self._deliver(batch, [error] * len(batch))
                continue
            ended = time.perf_counter()
            with self._lock:  # what passed since another batch ended is this one's, or they would be counted twice
                took, self._finished = ended - max(started, self._finished), ended
                self._photo_s += 0.2 * (took / len(batch) - self._photo_s)
            self._observe("model", ended - started)
            self._observe("batch", len(batch))
            self._deliver(batch, list(vectors))

    def _deliver(self, works: Sequence[_Work], results: Sequence[Embedding | Exception]) -> None:
        """Hand results to the event loop, all of a batch at once."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            works[0].done.get_loop().call_soon_threadsafe(self._finish, works, results)

    @staticmethod
    def _finish(works: Sequence[_Work], results: Sequence[Embedding | Exception]) -> None:
        for work, result in zip(works, results, strict=True):
            work.square = None
            if isinstance(result, Exception) and not isinstance(result, MediaError):
                work.done.set_exception(result)
                work.done.exception()  # seen here too, for it may be that nobody waits any more
            else:
                work.done.set_result(result)

    def close(self) -> None:
        """Let the threads go, and wait for what they are at."""
        with self._lock:
            self._closed = True
            self._undecoded.notify_all()
            self._unencoded.notify_all()
        for thread in self._threads:
            thread.join(_CLOSE_S)
