"""What routes take and answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from cliphar.errors import MediaError
from cliphar.labels import MAX_LABELS
from cliphar.serving._document import docs, reference
from cliphar.serving._problems import ProblemError, said
from cliphar.serving._settings import Settings
from cliphar.serving._urls import Budget, fetch_image

__all__ = [
    "FILE",
    "PHOTOS",
    "PREDICT_BODY",
    "Answers",
    "Asked",
    "AskedLabels",
    "Scored",
    "Unread",
    "answers",
    "decode_base64",
    "form_body",
    "photos_of",
    "read_asked",
    "refuse_unknown",
]

T = TypeVar("T")


class Asked(BaseModel):
    """A question: photos, and the labels to choose from."""

    model_config = ConfigDict(extra="forbid")

    images: Annotated[
        list[str],
        Field(
            min_length=1,
            description="Photos in base64 or as data: URLs; http(s) URLs too if the service allows them.",
        ),
    ]
    labels: Annotated[
        list[str] | str | None,
        Field(description="A list of labels, comma-separated labels, or a vocabulary's name."),
    ] = None
    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    coverage: Annotated[float, Field(gt=0, lt=1)] = 0.9


class Scored(BaseModel):
    """A label and its score."""

    label: str
    score: float


class Answer(BaseModel):
    """The answer for one photo."""

    label: str
    score: float
    set: list[str]
    top: list[Scored]
    evidence: Annotated[float, Field(description="The best label's cosine, -1..1.")]


class Unread(BaseModel):
    """Why a photo could not be read."""

    error: str


class Answers(BaseModel):
    """One answer per photo, in order."""

    model: str
    predictions: list[Answer | Unread]


FILE: dict[str, Any] = {"type": "string", "format": "binary"}
PHOTOS: dict[str, Any] = {"type": "array", "items": FILE, "minItems": 1}
_QUESTION: dict[str, dict[str, Any]] = {
    # else /docs asks "string"
    "labels": {"type": "string", "description": "Comma-separated labels, or a vocabulary's name.", "default": ""},
    "top_k": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
    "coverage": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "default": 0.9},
}


def form_body(fields: dict[str, Any], others: dict[str, Any] | None = None) -> dict[str, Any]:
    """What OpenAPI is told of a form of these fields, the first of which must be there, and of ``others``, bodies that
    will do as well, by their type."""
    schema = {"type": "object", "required": [*fields][:1], "additionalProperties": False, "properties": fields}
    contents = {"multipart/form-data": schema} | (others or {})
    return {"requestBody": {"required": True, "content": {kind: {"schema": one} for kind, one in contents.items()}}}


PREDICT_BODY: dict[str, Any] = form_body(
    {"images": PHOTOS} | _QUESTION,
    {"application/json": reference(Asked), "image/*": FILE, "application/octet-stream": FILE},
) | {"parameters": [{"name": name, "in": "query", "schema": one} for name, one in _QUESTION.items()]}


def decode_base64(text: str) -> bytes:
    """Bytes of base64 text, which may have line breaks, or a data: URL; ProblemError 422 if it is neither."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError(422, f"an image is not base64: {error}") from error


async def read_asked(request: Request, settings: Settings) -> tuple[Sequence[bytes | MediaError], Asked]:
    """Photos, or why one cannot be had, and question of a multipart, JSON or raw image body.

    Raises:
        ProblemError: 415 for another kind of body, 422 for one that does not hold what it should, 403 for an address
            that may not be fetched.
    """
    refuse_unknown(request.query_params, *_QUESTION)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        content = await _json(request, settings)
        asked = _checked(request, _question(request.query_params) | content if isinstance(content, dict) else content)
        settings.check_images(len(asked.images))  # before any of them is fetched
        budget = Budget(settings.max_body_mb)
        return await asyncio.gather(*(_image(text, settings, budget) for text in asked.images)), asked
    if kind == "multipart/form-data":
        async with request.form(max_files=settings.most_files, max_fields=2 * MAX_LABELS) as form:
            contents = await photos_of(form, *_QUESTION)
            question = _question(request.query_params) | _question(form)
            return contents, _checked(request, question | {"images": ["-"] * len(contents)})
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [await request.body()], _checked(request, _question(request.query_params) | {"images": ["-"]})
    raise ProblemError(415, "send multipart/form-data with images, a raw image/* body, or application/json")


async def _image(text: str, settings: Settings, budget: Budget) -> bytes | MediaError:
    if not text.startswith(("http://", "https://")):
        return decode_base64(text)
    try:
        return await fetch_image(text, settings, budget)
    except ProblemError as problem:
        if problem.status_code == 403:
            raise
        return MediaError(problem.detail)  # the other photos are answered


async def _json(request: Request, settings: Settings) -> Any:
    # millions of values take minutes and gigabytes to look at; a base64 text has no comma
    most = 1000 + 2 * (settings.max_images + settings.max_labels)
    if (await request.body()).count(b",") > most:
        raise ProblemError(422, f"the body holds more than {most} values; see {docs(request)}")
    try:
        return await request.json()
    except (ValueError, RecursionError) as error:
        raise ProblemError(422, f"the body is not JSON: {error}") from error


async def photos_of(form: FormData, *others: str) -> list[bytes]:
    """The files ``images`` of a form that may have other fields too; ProblemError 422 if there are none, or one of
    them is text: it would have no answer, and the others another's."""
    refuse_unknown(form, "images", *others)
    parts = form.getlist("images")
    contents = []
    for part in parts:
        if isinstance(part, UploadFile):
            contents.append(await part.read())
            await part.close()  # the form's own copy
    if not contents or len(contents) < len(parts):
        raise ProblemError(422, "the form has no image, or one that is no file; send each so: -F images=@photo.jpg")
    return contents


def refuse_unknown(fields: Iterable[str], *known: str) -> None:
    """ProblemError 422 for a name that is not known: one that is misspelt would be answered as if it were not there."""
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
            raise ProblemError(422, f"unknown field '{name[:50]}'; {hint}")


def _question(fields: FormData | Any) -> dict[str, Any]:
    question: dict[str, Any] = {name: fields[name] for name in ("top_k", "coverage") if name in fields}
    given = fields.getlist("labels")
    texts = [label for label in given if isinstance(label, str)]
    if len(texts) < len(given):  # else they would be answered as if they were not there
        raise ProblemError(422, "labels came as a file; send them as text: -F 'labels=cooking, sleeping'")
    labels = _one_or_many(texts)
    return question if labels is None else question | {"labels": labels}


def _one_or_many(labels: list[str]) -> list[str] | str | None:
    """Several are labels, as they are; a single one may be a vocabulary's name or have commas; a blank one is none."""
    if len(labels) > 1:
        return labels
    return labels[0] if labels and labels[0].strip() else None


async def _of_query(
    labels: Annotated[
        list[str] | None,
        Query(description="Comma-separated labels, or a vocabulary's name; if repeated, each is one label."),
    ] = None,
) -> list[str] | str | None:
    return _one_or_many(labels or [])


AskedLabels = Annotated[list[str] | str | None, Depends(_of_query)]


def _checked(request: Request, content: Any) -> Asked:
    try:
        return Asked.model_validate(content)
    except ValidationError as error:
        raise ProblemError(422, said(error, docs(request))) from error


def answers(
    model: str, what: str, found: Sequence[T | MediaError], row: Callable[[T], dict[str, Any]]
) -> dict[str, Any]:
    """The JSON form, a ``row`` for each photo; ProblemError 422 if none could be read, with the same rows."""
    rows = [{"error": str(one)} if isinstance(one, MediaError) else row(one) for one in found]
    if all(isinstance(one, MediaError) for one in found):
        raise ProblemError(422, "; ".join(dict.fromkeys(str(one) for one in found)), more={what: rows})
    return {"model": model, what: rows}
