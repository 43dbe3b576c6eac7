"""Around every request: an id, a log line, metrics, bounds, keys, and an end to work that nobody waits for."""

from __future__ import annotations

import asyncio
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cliphar.serving._keys import Keys
from cliphar.serving._problems import ProblemError, problem_response
from cliphar.serving._service import Service

__all__ = ["Around"]

_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_OPEN = frozenset({"/livez", "/readyz", "/health", "/metrics"})
_log = structlog.get_logger()


class Around:
    """Pure ASGI, so that bodies stream through it."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys) -> None:
        self._app, self._service, self._keys = app, service, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")[:64] or uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started, status = time.perf_counter(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                for name, value in _SECURITY.items():
                    out.setdefault(name, value)
            await send(message)

        body = _Body(receive, self._service.settings.max_body_mb * 2**20)
        try:
            if scope["path"] not in _OPEN:
                client = (scope.get("client") or ("",))[0]
                self._keys.check(headers.get("authorization"), headers.get("x-api-key"), client)
            body.check_length(headers.get("content-length"))
            await self._unless_gone(scope, body, answer)
        except ProblemError as problem:  # raised here, or by the body inside a handler that let it pass
            extra = {"Retry-After": str(round(problem.retry_after_s or 1))} if problem.status == 429 else None
            await problem_response(problem.status, problem.detail, extra)(scope, receive, answer)
        finally:
            took = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            metrics = self._service.metrics
            metrics.requests.labels(scope["method"], route, str(status)).inc()
            metrics.latency.labels(route).observe(took)
            if scope["path"] not in _OPEN:
                _log.info("request", method=scope["method"], path=scope["path"], status=status, seconds=round(took, 4))

    async def _unless_gone(self, scope: Scope, body: _Body, send: Send) -> None:
        """Run the handler, and stop it when the client has gone away."""
        work = asyncio.ensure_future(self._app(scope, body.receive, send))
        gone = asyncio.ensure_future(body.gone.wait())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            await work
        except asyncio.CancelledError:
            if not body.gone.is_set():
                raise
        finally:
            gone.cancel()
            body.close()


class _Body:
    """The request's messages, counted; once the body is in, it watches for the client's going away."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._size = receive, limit, 0
        self._watch: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    def check_length(self, length: str | None) -> None:
        if length is not None and length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"the body is over {self._limit // 2**20} MB; send fewer or smaller images")

    async def receive(self) -> Message:
        if self._watch is not None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone.set()
        elif not message.get("more_body"):
            self._watch = asyncio.ensure_future(self._until_gone())
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        return message

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
