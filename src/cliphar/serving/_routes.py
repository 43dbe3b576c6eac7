"""/v1: predict, embed, models, labels, actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException, Path, Request, Response
from pydantic import BaseModel, FailFast, Field, StringConstraints

from cliphar.bundle import Metrics
from cliphar.errors import UsageError
from cliphar.evaluation import bundled_evaluation, model_card
from cliphar.recognizer import Prediction, Recognizer
from cliphar.serving._bodies import (
    PHOTOS,
    PREDICT_BODY,
    Answers,
    Scored,
    Unread,
    answers,
    form_body,
    photos_of,
    read_asked,
)
from cliphar.serving._document import PROBLEM_RESPONSES
from cliphar.serving._problems import ProblemError
from cliphar.serving._service import Service, TheService

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["recognition"], responses=PROBLEM_RESPONSES)
_Name = Annotated[
    str, StringConstraints(strip_whitespace=True), Path(min_length=1, max_length=200, pattern=r"^[^/\x00-\x1f]+$")
]


class Embedding(BaseModel):
    embedding: list[float]


class Embeddings(BaseModel):
    model: str
    embeddings: list[Embedding | Unread]


class ModelSummary(BaseModel):
    name: str
    description: str
    runtime: str
    labels: list[str]
    taught: Annotated[
        dict[str, int], Field(description="The taught actions, and how many photos each was taught from.")
    ]
    image_size: int
    embedding_dim: int
    metrics: dict[str, Metrics]


class Models(BaseModel):
    models: list[ModelSummary]


class Model(ModelSummary):
    card: Annotated[str, Field(description="Markdown.")]
    evaluation: dict[str, Any] | None


class Lesson(BaseModel):
    name: str
    photos: int
    refused: Annotated[list[str], Field(description="Why photos were left out that could not be read.")]
    recall: Annotated[float | None, Field(description="The share of photos recognised by what the others teach, 0..1.")]
    confused_with: list[Scored]


@router.post("/predict", response_model=Answers, openapi_extra=PREDICT_BODY)
async def predict(request: Request, service: TheService) -> dict[str, Any]:
    """Recognise actions in photos: multipart ``images``, one raw image, or JSON with base64."""
    contents, asked = await read_asked(request, service.settings)
    found = await service.answer(contents, asked.labels, asked.top_k, asked.coverage)
    return answers(service.recognizer.bundle.info.name, "predictions", found, Prediction.to_dict)


@router.post("/embed", response_model=Embeddings, openapi_extra=PREDICT_BODY)
async def embed(request: Request, service: TheService) -> dict[str, Any]:
    """Embed photos as vectors of unit length; one that cannot be read has its error instead."""
    contents, _ = await read_asked(request, service.settings)
    found = await service.embed(contents)
    return answers(service.recognizer.bundle.info.name, "embeddings", found, lambda one: {"embedding": one.tolist()})


@router.get("/models", response_model=Models)
async def models(service: TheService) -> dict[str, Any]:
    """The model that answers: its labels, measured accuracy and origin."""
    await service.refresh()
    return {"models": [_about(service.recognizer)]}


@router.get("/models/{name}", response_model=Model)
async def model(name: _Name, service: TheService) -> dict[str, Any]:
    """The same for one model, with its ``card`` in Markdown and its ``evaluation``: what its training measured, as
    ``cliphar eval --report`` writes it, or null."""
    await service.refresh()
    bundle = service.recognizer.bundle
    if name != bundle.info.name:
        raise ProblemError(404, f"no model '{name}' here; there is: {bundle.info.name}")
    return _about(service.recognizer) | {"card": model_card(bundle), "evaluation": bundled_evaluation(bundle)}


def _about(recognizer: Recognizer) -> dict[str, Any]:
    info = recognizer.bundle.info
    return {
        "name": info.name,
        "description": info.description,
        "runtime": recognizer.runtime.name,
        "labels": list(recognizer.labels),
        "taught": recognizer.taught,
        "image_size": info.image.size,
        "embedding_dim": info.embedding_dim,
        "metrics": {name: metrics.model_dump() for name, metrics in info.metrics.items()},
    }


@router.get("/labels")
async def vocabularies(service: TheService) -> dict[str, list[str]]:
    """Vocabularies, which are named lists of labels: the built-in ones and those put here."""
    await service.refresh()
    return {name: list(labels) for name, labels in service.state.vocabularies.items()}


@router.get("/labels/{name}")
async def vocabulary(name: _Name, service: TheService) -> list[str]:
    """One vocabulary."""
    await service.refresh()
    known = service.state.vocabularies
    if name not in known:
        raise ProblemError(404, f"no vocabulary '{name}'; there are: {', '.join(known)}")
    return list(known[name])


@router.put("/labels/{name}")
async def put_vocabulary(
    name: _Name, labels: Annotated[list[str], FailFast(), Body(min_length=1)], service: TheService
) -> list[str]:
    """Keep a list of labels as a vocabulary; requests can then give its name as ``labels``."""
    chosen = service.labels(labels) or ()
    await service.change(service.state.put_vocabulary, name, chosen)
    return list(chosen)


@router.delete("/labels/{name}", status_code=204)
async def delete_vocabulary(name: _Name, service: TheService) -> Response:
    """Delete a vocabulary that was put here."""
    return await _drop(service, service.state.delete_vocabulary, name)


@router.get("/actions")
async def actions(service: TheService) -> dict[str, int]:
    """The taught actions, and how many photos each was taught from."""
    await service.refresh()
    return service.recognizer.taught


@router.post("/actions/{name}", response_model=Lesson, openapi_extra=form_body({"images": PHOTOS}))
async def teach(name: _Name, request: Request, service: TheService) -> dict[str, Any]:
    """Teach an action from photos, multipart ``images``. It is kept, and known from the next request on."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ProblemError(415, "send multipart/form-data with images")
    async with request.form(max_files=service.settings.most_files, max_fields=1000) as form:
        photos = await photos_of(form)
    service.settings.check_images(len(photos))
    lesson = await service.change(service.teach, name, photos)
    return lesson.to_dict()


@router.delete("/actions/{name}", status_code=204)
async def forget(name: _Name, service: TheService) -> Response:
    """Forget a taught action."""
    return await _drop(service, service.state.forget, name)


@router.get("/stream", include_in_schema=False)
async def no_stream() -> None:
    """The stream without an offer of WebSocket, which a proxy may have left out."""
    why = "this is a WebSocket; a proxy must pass on Upgrade and Connection, see docs/serving.md"
    raise HTTPException(426, why, {"Upgrade": "websocket"})


async def _drop(service: Service, drop: Callable[[str], None], name: str) -> Response:
    try:
        await service.change(drop, name)
    except UsageError as error:
        raise ProblemError(404, str(error)) from error
    return Response(status_code=204)
