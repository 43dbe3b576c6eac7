"""POST /v1/video: a clip in, its segments out as JSON lines while it is read."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool
from starlette.datastructures import UploadFile

from cliphar.errors import MediaError
from cliphar.serving._bodies import FILE, AskedLabels, form_body, refuse_unknown
from cliphar.serving._document import PROBLEM_RESPONSES
from cliphar.serving._problems import ProblemError
from cliphar.serving._service import TheService
from cliphar.timeline import Progress, Segment, Timeline, stream_video

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["recognition"], responses=PROBLEM_RESPONSES)
_AT_ONCE = 2  # a clip keeps a core busy for long; more would make all late, and photos too
_places = asyncio.Semaphore(_AT_ONCE)
_Items = Generator[Progress | Segment | Timeline, None, None]


async def _held() -> AsyncIterator[AsyncExitStack]:
    """What is held until the answer is out, or the caller gone."""
    async with AsyncExitStack() as stack:
        yield stack


@router.post(
    "/video",
    openapi_extra=form_body({"video": FILE}, {"video/*": FILE, "application/octet-stream": FILE}),
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
async def video(
    request: Request,
    service: TheService,
    held: Annotated[AsyncExitStack, Depends(_held)],
    labels: AskedLabels,
    coverage: Annotated[float, Query(gt=0, lt=1)] = 0.9,
    multi_label: bool = False,
    fps: Annotated[float | None, Query(ge=0.01, le=60)] = None,
) -> StreamingResponse:
    """Recognise what happens when in a clip, ``video`` of a form or a raw ``video/*`` body; the rest in the query.

    Lines are ``{"progress": {"time_s", "duration_s"}}``, ``{"segment": {...}}`` as soon as it is decided, and at last
    ``{"timeline": {...}}``, or ``{"error": ...}`` if not one frame can be read.
    """
    refuse_unknown(request.query_params, "labels", "coverage", "multi_label", "fps")
    await service.refresh()
    chosen = service.labels(labels)
    source = await _clip(request)
    if _places.locked():
        raise ProblemError(503, f"{_AT_ONCE} videos are being read; try again later", retry_after_s=5)
    await held.enter_async_context(_places)
    items = await asyncio.to_thread(
        stream_video, service.recognizer, source, chosen, coverage=coverage, multi_label=multi_label, fps=fps
    )
    return StreamingResponse(_lines(items), media_type="application/x-ndjson")


async def _clip(request: Request) -> BinaryIO:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        form = await request.form(max_files=1, max_fields=10)  # closed with the request
        part = form.get("video")
        if not isinstance(part, UploadFile):
            raise ProblemError(422, "the form has no video; send it as a file 'video': -F video=@clip.mp4")
        if others := [name for name in form if name != "video"]:  # else labels in the form would not be seen
            raise ProblemError(422, f"unknown field '{others[0][:50]}'; what is not the video goes into the query")
        return part.file
    if kind.startswith("video/") or kind == "application/octet-stream":
        return io.BytesIO(await request.body())
    raise ProblemError(415, "send multipart/form-data with video, or a raw video/* body")


async def _lines(items: _Items) -> AsyncIterator[str]:
    try:
        async for item in iterate_in_threadpool(items):
            yield json.dumps({type(item).__name__.lower(): item.to_dict()}, ensure_ascii=False) + "\n"
    except MediaError as error:
        yield json.dumps({"error": str(error)}) + "\n"
    finally:
        await asyncio.to_thread(items.close)
