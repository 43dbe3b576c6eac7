"""Around every request: an id, a log line, metrics, bounds, keys, and an end to work that nobody waits for."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cliphar.serving._keys import Keys
from cliphar.serving._problems import ProblemError, problem_response, refusal
from cliphar.serving._service import Service

__all__ = ["BODIES_AT_ONCE", "OPEN", "Around", "below"]

_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
OPEN = frozenset({"/livez", "/readyz", "/health", "/metrics", "/v2/health/live", "/v2/health/ready"})
# a browser has no key before the page that asks for it is there
_DOCUMENTATION = ("/docs", "/openapi.json", "/static-offline-docs/")
_COMPRESSED = {"gzip", "deflate", "br", "zstd"}
_ID = re.compile(r"[\w.:/+=-]{1,64}", re.ASCII)
# bodies are held in memory: in all, no more than so many of the largest allowed, and as much of streams
BODIES_AT_ONCE = 4
MultiPartParser.spool_max_size = 0  # a form's files too: a read-only container may have no other place
_log = structlog.get_logger()


def below(root: str, app: ASGIApp) -> ASGIApp:
    """``app`` under the path ``root``, whether a proxy strips it or passes it on, or there is no proxy."""

    async def placed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            path: str = scope["path"]
            # as ASGI has it, the path includes the root path
            scope.update(root_path=root, path=path if f"{path}/".startswith(f"{root}/") else root + path)
        await app(scope, receive, send)

    return placed


def _own_path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("app_root_path", scope.get("root_path", "")))


class Around:
    """Pure ASGI, so that bodies stream through it."""

    def __init__(self, app: ASGIApp, owner: FastAPI, keys: Keys) -> None:
        self._app, self._owner, self._keys = app, owner, keys
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        handle = {"http": self._http, "websocket": self._websocket}.get(scope["type"], self._app)
        await handle(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":  # what watches a service often asks so; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        service: Service = self._owner.state.service
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        started, status = time.perf_counter(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                for name, value in _SECURITY.items():
                    out.setdefault(name, value)
                if not self._owner.state.service.ready:  # it stops: the next request must go elsewhere
                    out["Connection"] = "close"
            await send(message)

        body = _Body(receive, service.settings.max_body_mb * 2**20, service.settings.deadline_s, self._hold)
        scope.setdefault("state", {})["service"] = service
        service.users += 1
        try:
            self._check_request(headers, scope, service)
            body.declare(headers)
            await self._unless_gone(scope, body, answer)
        except ProblemError as problem:  # raised here, or by the body inside a handler that let it pass
            await refusal(problem)(scope, receive, answer)
        except ClientDisconnect:
            pass
        except Exception as error:
            _log.error("failed", error=type(error).__name__, exc_info=error)
            if status != 499:  # half an answer is out: end the connection
                raise
            await problem_response(500, "the service failed on this request; its log says more")(scope, receive, answer)
        finally:
            service.users -= 1
            self._held -= body.held
            self._record(service, scope, status, time.perf_counter() - started)

    def _check_request(self, headers: Headers, scope: Scope, service: Service) -> None:
        """What can be refused before a body is read."""
        if scope["method"] != "GET":
            self._check_origin(headers)
        if (path := _own_path(scope)) not in OPEN and not path.startswith(_DOCUMENTATION):
            self._check_caller(headers, scope)
        if headers.get("content-encoding", "").lower() in _COMPRESSED:  # it would be taken for a damaged photo
            raise ProblemError(415, "send the body without compression")
        if scope["method"] == "POST":
            service.engine.check_room(1, service.settings.deadline_s)

    def _hold(self, size: int, limit: int) -> None:
        if self._held + size > BODIES_AT_ONCE * limit:
            raise ProblemError(503, "too many large bodies at once; try again later", retry_after_s=1)
        self._held += size

    @staticmethod
    def _record(service: Service, scope: Scope, status: int, took: float) -> None:
        # the route's own pattern, for paths are endless and a metric must not be
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope.get("method", "WS")
        service.metrics.requests.labels(method, route, str(status)).inc()
        if scope["type"] == "http":  # how long a camera watches is no latency
            service.metrics.latency.labels(route).observe(took)
        if (path := _own_path(scope)) not in OPEN:
            _log.info("request", method=method, path=path, status=status, seconds=round(took, 4))

    def _check_caller(self, headers: Headers, scope: Scope) -> None:
        client = (scope.get("client") or ("",))[0]
        self._keys.check(headers.get("authorization"), headers.get("x-api-key"), client)

    def _check_origin(self, headers: Headers) -> None:
        """Browsers let any page open a socket and send a form anywhere, so CORS does not help here."""
        origin = headers.get("origin")
        allowed = self._owner.state.service.settings.cors_origins
        own = (origin or "").partition("://")[2] == headers.get("host")
        own |= headers.get("sec-fetch-site") == "same-origin"  # a browser's word, where a proxy changes the Host
        if origin and not own and "*" not in allowed and origin not in allowed:
            raise ProblemError(403, "pages of this origin may not call; see --cors")

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, headers = self._owner.state.service, Headers(scope=scope)
        told = (b"x-request-id", _request_id(headers).encode())
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] in ("websocket.accept", "websocket.http.response.start"):
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", ()), told]
            if status:
                await send(message)

        try:
            self._check_origin(headers)
            self._check_caller(headers, scope)
            await self._app(scope, receive, answer)
            if not status:  # the handshake was closed unanswered
                raise ProblemError(404, f"there is no stream {scope['path'][:200]}; see docs/serving.md")
        except ProblemError as problem:
            response = refusal(problem)
            start = {"status": response.status_code, "headers": response.raw_headers}
            await answer({"type": "websocket.http.response.start"} | start)
            await answer({"type": "websocket.http.response.body", "body": bytes(response.body)})
        finally:
            self._record(service, scope, status, time.perf_counter() - started)

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
                work.cancel()
                raise
        finally:
            gone.cancel()
            body.close()
            del work  # its error holds this frame, and both would hold the body until garbage is collected


def _request_id(headers: Headers) -> str:
    """The caller's, or a new one; in every line that is logged from here on."""
    given = headers.get("x-request-id", "")
    request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
    return request_id


class _Body:
    """The request's messages, counted; once the body is in, it watches for the client's going away."""

    def __init__(self, receive: Receive, limit: int, deadline_s: float, hold: Callable[[int, int], None]) -> None:
        self._receive, self._limit, self._hold = receive, limit, hold
        self._size = self.held = 0
        self._until = asyncio.get_running_loop().time() + deadline_s
        self._watch: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    def declare(self, headers: Headers) -> None:
        """Find room for what is to come; a body in chunks does not say how large it is, and takes room as it comes."""
        length = headers.get("content-length", "")
        size = int(length) if length.isdecimal() and "transfer-encoding" not in headers else 0
        if size > self._limit:
            raise self._too_large()
        self._grow(size)

    def _grow(self, size: int) -> None:
        if size > self.held:
            self._hold(size - self.held, self._limit)
            self.held = size

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"the body is over {self._limit // 2**20} MB; send fewer or smaller images")

    async def receive(self) -> Message:
        if self._watch is not None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError as error:
            raise ProblemError(408, "the body did not come within the time a request may take") from error
        if message["type"] == "http.disconnect":
            self.gone.set()
        elif not message.get("more_body"):
            self._watch = asyncio.ensure_future(self._until_gone())
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        self._grow(self._size)
        return message

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
