"""What a connection may take without being served: uvicorn bounds neither a head's size nor its time, nor a pause."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Protocol"]

_HEAD = 2**17  # labels in an address are the longest that is meant


class Protocol(HttpToolsProtocol):
    """uvicorn's, which closes what sends a larger head, or larger trailers, takes too long to send a request, or reads
    no more of its answer.

    Args:
        request_s: how long a request may take to come in, a new connection be silent, and an answer stay unread.
        uvicorn: what uvicorn gives.
    """

    def __init__(self, *, request_s: float, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._request_s = request_s
        self._head = 0
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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
        super().data_received(data)
        if self._head > _HEAD and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

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
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head = 0
        self._stop()
        super().on_message_complete()

    def _start(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self._request_s, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
