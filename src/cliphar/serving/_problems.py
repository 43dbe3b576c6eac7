"""Every refusal is a problem document (RFC 9457): a title, what is wrong, and what to do."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError, ValidationException, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from cliphar.errors import ClipharError, MediaError, UsageError
from cliphar.serving._document import PROBLEM, docs

__all__ = ["ProblemError", "add_problem_handlers", "problem_response", "refusal", "said"]


class ProblemError(HTTPException):
    """A refusal with its HTTP status; ``retry_after_s`` tells a client when to come again.

    ``more`` goes into the document as it is.
    """

    def __init__(
        self, status: int, detail: str, *, retry_after_s: float | None = None, more: dict[str, Any] | None = None
    ) -> None:
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        super().__init__(status, detail, headers)
        self.more = more or {}

    def __str__(self) -> str:
        return self.detail


def problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None, more: dict[str, Any] | None = None
) -> JSONResponse:
    """The document as a response; ``error`` is what clients of the open inference protocol look for."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    body |= {"detail": detail, "error": detail} | (more or {})
    if request_id := structlog.contextvars.get_contextvars().get("request_id"):
        body["request_id"] = request_id
    return JSONResponse(body, status, headers=headers, media_type=PROBLEM)


def refusal(error: HTTPException) -> JSONResponse:
    """The response of a refusal, with the headers that belong to it."""
    more = error.more if isinstance(error, ProblemError) else None
    return problem_response(error.status_code, str(error.detail), dict(error.headers or {}), more)


def said(error: ValidationException | ValidationError, see: str) -> str:
    """The first thing that is wrong with what was sent, and where."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return f"{where}: {first['msg']}; see {see}"


def _methods(request: Request) -> str:
    """What the path takes; Starlette's own refusal names the methods of one route only."""
    ways = [{**request.scope, "method": method} for method in ("GET", "POST", "PUT", "DELETE")]
    found = [way for way in ways if any(route.matches(way)[0] is Match.FULL for route in request.app.routes)]
    return ", ".join(way["method"] for way in found)


def add_problem_handlers(app: FastAPI) -> None:
    """Turn what is raised in a route into a problem document; what nobody foresaw is left to :class:`Around`."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404 and not isinstance(error, ProblemError):
            return problem_response(404, f"there is no path {request.url.path[:200]}; see {docs(request)}")
        if error.status_code == 405 and (allowed := _methods(request)):
            detail = f"{request.url.path[:200]} does not take {request.method}; use {allowed}; see {docs(request)}"
            return problem_response(405, detail, {"Allow": allowed})
        return refusal(error)

    @app.exception_handler(ClipharError)
    async def cannot(_request: Request, error: ClipharError) -> JSONResponse:
        if isinstance(error, MediaError | UsageError):
            return problem_response(422, str(error))
        structlog.get_logger().error("failed", error=str(error))  # the operator must know
        return problem_response(500, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if error.errors()[0]["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
            return problem_response(415, "send JSON, and say so: -H 'Content-Type: application/json'")
        return problem_response(422, said(error, docs(request)))

    @app.exception_handler(WebSocketRequestValidationError)
    async def no_stream(websocket: WebSocket, error: WebSocketRequestValidationError) -> None:
        await websocket.send_denial_response(problem_response(422, said(error, docs(websocket))))
