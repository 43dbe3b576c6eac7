"""WS /v1/stream: a camera's frames in, steady answers out, always about the newest frame."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect
from numpy.typing import NDArray

from cliphar.errors import MediaError, UsageError
from cliphar.serving._problems import ProblemError
from cliphar.serving._service import Service

__all__ = ["router"]

router = APIRouter(prefix="/v1")
_POLICY = 1008  # RFC 6455: what was sent breaks a rule of ours


class _Newest:
    """The newest frame that came; older ones that nobody took are dropped."""

    def __init__(self) -> None:
        self._frame: tuple[int, bytes, float] | None = None
        self._came = asyncio.Event()
        self._count = 0

    def put(self, frame: bytes) -> None:
        self._frame = (self._count, frame, time.perf_counter())
        self._count += 1
        self._came.set()

    async def take(self) -> tuple[int, bytes, float]:
        await self._came.wait()
        self._came.clear()
        assert self._frame is not None  # noqa: S101 - put() came before
        return self._frame


class _Steady:
    """An exponential mean of embeddings over time, of which half is forgotten every ``half_life_s`` seconds."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._mean: NDArray[np.float32] | None = None
        self._at = 0.0

    def add(self, embedding: NDArray[np.float32], at: float) -> NDArray[np.float32]:
        """The mean with this one, float32 [D], unit length."""
        if self._mean is None or self._half_life_s == 0:
            self._mean = embedding
        else:
            kept = 0.5 ** ((at - self._at) / self._half_life_s)
            self._mean = kept * self._mean + (1 - kept) * embedding
        self._at = at
        unit: NDArray[np.float32] = (self._mean / np.linalg.norm(self._mean)).astype(np.float32)
        return unit


@router.websocket("/stream")
async def stream(
    websocket: WebSocket,
    labels: Annotated[str | None, Query()] = None,
    top_k: Annotated[int, Query(ge=1, le=1000)] = 5,
    coverage: Annotated[float, Query(gt=0, lt=1)] = 0.9,
    half_life_s: Annotated[float, Query(ge=0, le=60)] = 0.5,
) -> None:
    """Binary messages, an encoded image each; for each that is answered a text message, JSON: ``frame`` (its number,
    from 0), ``latency_ms``, and what /v1/predict answers, or ``error``."""
    service: Service = websocket.app.state.service
    await websocket.accept()
    try:
        await service.refresh()
        chosen = service.labels(labels)
    except (ProblemError, UsageError) as error:
        await websocket.send_json({"error": str(error)})
        await websocket.close(_POLICY)
        return
    newest = _Newest()

    async def answer() -> None:
        steady = _Steady(half_life_s)
        while True:
            number, frame, came = await newest.take()
            try:
                (found,) = await service.embed([frame])
                if isinstance(found, MediaError):
                    raise found
                mean = steady.add(found, came)
                (prediction,) = await asyncio.to_thread(service.score, mean[None], chosen, top_k, coverage)
                said = prediction.to_dict() | {"evidence": round(prediction.evidence, 6)}
            except (MediaError, UsageError, ProblemError) as error:
                said = {"error": str(error)}
            latency_ms = round(1e3 * (time.perf_counter() - came), 1)
            await websocket.send_json({"frame": number, "latency_ms": latency_ms} | said)

    work = asyncio.create_task(answer())
    try:
        while not work.done():
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                break
            if message.get("bytes") is None:
                await websocket.close(_POLICY, "send images as binary messages")
                break
            newest.put(message["bytes"])
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
            await work
