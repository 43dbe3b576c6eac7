"""The paths and bodies of an earlier generation of this system, so that its clients go on working."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile

from cliphar._version import __version__
from cliphar.errors import MediaError
from cliphar.serving._bodies import FILE, decode_base64, form_body
from cliphar.serving._document import PROBLEM_RESPONSES, docs
from cliphar.serving._problems import ProblemError
from cliphar.serving._service import Service, TheService
from cliphar.serving._urls import Budget, fetch_image

__all__ = ["router"]

router = APIRouter(tags=["earlier clients"], responses=PROBLEM_RESPONSES)
_TopK = Annotated[int, Field(ge=1, le=1000)]


class EarlierPhoto(BaseModel):
    image_data: str | None = None
    image_url: str | None = None
    top_k: _TopK = 5


class Ranked(BaseModel):
    rank: int
    class_id: int
    class_name: str
    score: float


class EarlierAnswer(BaseModel):
    predictions: list[Ranked]
    inference_time: float
    model_name: str


@router.get("/")
async def root(request: Request, service: TheService) -> dict[str, Any]:
    """The service's name, version and model."""
    name = service.recognizer.bundle.info.name
    return {"name": "cliphar", "version": __version__, "model": name, "docs": docs(request)}


@router.get("/health")
async def health(service: TheService) -> dict[str, Any]:
    """Whether the service answers."""
    return {"status": "healthy" if service.ready else "starting", "model_loaded": service.ready}


@router.post("/predict", name="earlier_predict", response_model=EarlierAnswer)
async def predict(asked: EarlierPhoto, service: TheService) -> dict[str, Any]:
    """Recognise one photo, in base64 or by its URL."""
    if (asked.image_data is None) == (asked.image_url is None):
        raise ProblemError(422, "give image_data or image_url, one of the two")
    if asked.image_data is not None:
        content = decode_base64(asked.image_data)
    else:
        content = await fetch_image(asked.image_url or "", service.settings, Budget(service.settings.max_body_mb))
    return await _answer(service, content, asked.top_k)


@router.post(
    "/predict/image",
    name="earlier_predict_image",
    response_model=EarlierAnswer,
    openapi_extra=form_body({"file": FILE}),
)
async def predict_image(
    request: Request, service: TheService, top_k: Annotated[int, Query(ge=1, le=1000)] = 5
) -> dict[str, Any]:
    """Recognise one photo, a file of a form; the field may have any name."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ProblemError(415, "send multipart/form-data with a file")
    async with request.form() as form:
        files = [part for part in form.values() if isinstance(part, UploadFile)]
        if not files:
            raise ProblemError(422, "the form has no file")
        content = await files[0].read()
    return await _answer(service, content, top_k)


async def _answer(service: Service, content: bytes, top_k: int) -> dict[str, Any]:
    started = time.perf_counter()
    (found,) = await service.answer([content], None, top_k, 0.9)
    if isinstance(found, MediaError):
        raise found
    number = {label: i for i, label in enumerate(service.recognizer.labels)}
    return {
        "predictions": [
            {"rank": rank, "class_id": number[label], "class_name": label, "score": round(score, 6)}
            for rank, (label, score) in enumerate(found.top, start=1)
        ],
        "inference_time": round(time.perf_counter() - started, 6),
        "model_name": service.recognizer.bundle.info.name,
    }
