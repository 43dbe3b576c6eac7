"""Every refusal is a problem document (RFC 9457): a title, what is wrong, and what to do."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError, ValidationException, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cliphar.errors import ClipharError, MediaError, UsageError

__all__ = ["PROBLEM_RESPONSES", "ProblemError", "add_problem_handlers", "problem_response", "refusal"]

_TYPE = "application/problem+json"
_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "error": {"type": "string"},
        "request_id": {"type": "string"},
    },
}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": HTTPStatus(status).phrase, "content": {_TYPE: {"schema": _SCHEMA}}}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503)
}


class ProblemError(Exception):
    """A refusal with its HTTP status; ``retry_after_s`` tells a client when to come again."""

    def __init__(self, status: int, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


def problem_response(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The document as a response; ``error`` is what clients of the open inference protocol look for."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error": detail,
    }
    if request_id:
        body["request_id"] = request_id
    return JSONResponse(body, status, headers=headers, media_type=_TYPE)


def refusal(problem: ProblemError) -> JSONResponse:
    """The response of a refusal, with the headers that belong to it."""
    headers = {}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after_s)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem_response(problem.status, problem.detail, headers)


def add_problem_handlers(app: FastAPI) -> None:
    """Turn what is raised in a route into a problem document; what nobody foresaw is :class:`Around`'s."""

    @app.exception_handler(ProblemError)
    async def refused(_request: Request, problem: ProblemError) -> JSONResponse:
        return refusal(problem)

    @app.exception_handler(ClipharError)
    async def cannot(_request: Request, error: ClipharError) -> JSONResponse:
        if isinstance(error, MediaError | UsageError):
            return problem_response(422, str(error))
        structlog.get_logger().error("failed", error=str(error))  # no fault of who asks: the operator must know
        return problem_response(500, str(error))

    def said(error: ValidationException) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem_response(422, f"{where}: {first['msg']}; see /docs")

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return said(error)

    @app.exception_handler(WebSocketRequestValidationError)
    async def no_stream(websocket: WebSocket, error: WebSocketRequestValidationError) -> None:
        await websocket.send_denial_response(said(error))

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ProblemError):  # of the body, which FastAPI was reading
            return refusal(error.__cause__)
        return problem_response(error.status_code, str(error.detail), dict(error.headers or {}))
