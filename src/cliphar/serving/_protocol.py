"""What a connection may take without being served: uvicorn bounds neither a head's size nor its time, nor a pause, nor
what the frames of many streams take. And bodies that uvicorn would lose."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from cliphar.serving._document import PROBLEM
from cliphar.serving._problems import problem_response

__all__ = ["Protocol", "Streams"]

_HEAD = 2**17  # labels in an address are the longest that is meant
_FRAGMENT = 64  # what a part of a message takes besides its bytes, if any


class Protocol(HttpToolsProtocol):
    """uvicorn's, which closes what sends a larger head, or larger trailers, takes too long to send a request, or reads
    no more of its answer; an offer of another protocol, as Java's client and ``curl --http2`` make, is let pass.

    Args:
        request_s: how long a request may take to come in, a new connection be silent, and an answer stay unread.
        uvicorn: what uvicorn gives.
    """

    def __init__(self, *, request_s: float, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._request_s = request_s
        self._head = 0
        self._again = b""
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Corked(transport)))
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None and self._timer is None:
            self._start()  # an empty line ends uvicorn's wait for a request and begins none
        self._head += len(data)
        while data:
            self._came = data
            super().data_received(data)
            data, self._again = self._again, b""
        self._came = b""
        if self._head > _HEAD and not self.transport.is_closing():
            self.send_400_response("the headers are too large")

    def send_400_response(self, msg: str) -> None:
        """A problem document too; uvicorn's own words are of what cannot be read."""
        if msg.startswith("Invalid"):
            msg = "this cannot be read as HTTP/1.1; in an address spaces and letters beyond ASCII must be %-encoded"
        body = bytes(problem_response(400, msg).body)
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: {PROBLEM}\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._look(before=0)

    def _look(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            self.transport.abort()
        self._unread = self.loop.call_later(self._request_s, self._look, left) if left else None

    def on_message_begin(self) -> None:
        self._start()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head = 0
        if not self._offered():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered():
            return
        self._head = 0
        self._stop()
        super().on_message_complete()

    def _offered(self) -> bool:
        return self.parser.should_upgrade() and not self._should_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        """Read the request again without the offer: with it, httptools takes the body for another protocol's."""
        if self.parser.get_method() == b"CONNECT":
            self.send_400_response("this is no proxy")
            return
        error = sys.exception()
        rest = self._came[error.args[0] :] if error else b""  # how much was read
        head = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (header for header in self.headers if header[0] not in (b"upgrade", b"http2-settings"))
        self.parser = httptools.HttpRequestParser(self)
        self._again = head + b"".join(b"%s: %s\r\n" % header for header in kept) + b"\r\n" + rest

    def _start(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self._request_s, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Corked:
    """A transport that sends a head with its body: what is written waits a turn of the event loop for more."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._held = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._held:
            self._held, data = b"", self._held + data
            self._transport.write(data)
        else:
            self._held = data
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        if self._held and not self.is_closing():
            self._transport.write(self._held)
        self._held = b""

    def close(self) -> None:
        self._send()
        self._transport.close()


class Streams(WebSocketsSansIOProtocol):
    """uvicorn's, which closes the stream that holds the most when all hold too much.

    Args:
        most: bytes of all frames, whole or in part.
        uvicorn: what uvicorn gives.
    """

    def __init__(self, *, most: int, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._most = most
        self._coming = 0
        self._given: deque[int] = deque(maxlen=2)  # the app has a frame that it looks at and a newer one

    @property
    def held(self) -> int:
        """Bytes of the frame that comes and of those that the app has."""
        return self._coming + sum(self._given)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.conn.parser.close()  # it and conn hold each other, and the last frame, until garbage is collected

    def data_received(self, data: bytes) -> None:
        self._coming += len(data)
        super().data_received(data)
        if self.conn.handshake_exc and not self.transport.is_closing():  # uvicorn would leave it unanswered, and open
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()
        streams = [one for one in self.connections if isinstance(one, Streams) and not one.close_sent]
        if sum(one.held for one in streams) > self._most:
            max(streams, key=lambda one: one.held).give_up()

    def handle_cont(self, event: Frame) -> None:
        self._coming += _FRAGMENT
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._given.append(self._coming)
        self._coming = 0
        super().send_receive_event_to_app()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # a refusal is an answer; uvicorn would log that there was none

    def give_up(self) -> None:
        """Close it: another may have it better."""
        self.conn.fail(CloseCode.TRY_AGAIN_LATER, "the frames of all streams are too large; try again later")
        self.frames = []
        self.handle_parser_exception()
