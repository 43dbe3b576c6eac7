"""WS /v1/stream: a camera's frames in, steady answers out, always about the newest frame."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect

from cliphar.errors import ClipharError, MediaError, UsageError
from cliphar.serving._bodies import AskedLabels, refuse_unknown
from cliphar.serving._problems import ProblemError
from cliphar.serving._service import Service
from cliphar.timeline import Live

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


@router.websocket("/stream")
async def stream(
    websocket: WebSocket,
    labels: AskedLabels,
    top_k: Annotated[int, Query(ge=1, le=1000)] = 5,
    coverage: Annotated[float, Query(gt=0, lt=1)] = 0.9,
) -> None:
    """Binary messages, an encoded image each; for each that is answered a text message, JSON: ``frame`` (its number,
    from 0), ``latency_ms``, and what a ``LiveAnswer`` holds, or ``error``."""
    service: Service = websocket.app.state.service
    await websocket.accept()
    try:
        refuse_unknown(websocket.query_params, "labels", "top_k", "coverage")
        await service.refresh()
        chosen = service.labels(labels)
        live = await asyncio.to_thread(Live, service.recognizer, chosen, coverage=coverage, top_k=top_k)
    except (ProblemError, ClipharError) as error:
        await websocket.send_json({"error": str(error)})
        await websocket.close(_POLICY)
        return
    newest = _Newest()

    async def answer() -> None:
        nonlocal service
        while True:
            number, frame, came = await newest.take()
            try:
                if service is not (now := websocket.app.state.service):  # the model was changed
                    await asyncio.to_thread(live.change_model, now.recognizer, now.labels(labels))
                    service = now
                (found,) = await service.embed([frame], again=False)
                if isinstance(found, MediaError):
                    said = {"error": str(found)}
                else:
                    said = (await asyncio.to_thread(live.push_embedding, found, came)).to_dict()
            except (ProblemError, UsageError) as error:
                said = {"error": str(error)}
            except Exception as error:
                structlog.get_logger().error("failed", error=type(error).__name__, exc_info=error)
                said = {"error": "the service failed on this frame; its log says more"}
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
