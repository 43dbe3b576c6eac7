"""A service on a socket, from start to the last answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process
from typing import cast

import structlog
import uvicorn
from fastapi import FastAPI

from cliphar.errors import ClipharError, UsageError
from cliphar.runtime import cpu_quota
from cliphar.serving._app import create_app
from cliphar.serving._middleware import BODIES_AT_ONCE, below
from cliphar.serving._protocol import Protocol, Streams
from cliphar.serving._service import Service
from cliphar.serving._settings import Settings
from cliphar.serving._workers import supervise, terminal_closed

__all__ = ["run"]

_LAST_CALL_S = 0.5
_log = structlog.get_logger()


def run(settings: Settings, host: str, port: int, drain_s: int, workers: int = 1) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has come in, for at most ``drain_s`` seconds.

    Args:
        settings: of each worker.
        host: address to listen on.
        port: 0 takes a free one.
        drain_s: after it, what is not answered is dropped.
        workers: processes that share the socket, and the cores unless ``settings.threads`` says otherwise. For more
            than one, PROMETHEUS_MULTIPROC_DIR must name an empty directory before this package is imported.

    Raises:
        UsageError: the address cannot be listened on.
        ClipharError: the model cannot be loaded.
    """
    _set_up_logs()
    listener = _listen(host, port)
    if workers == 1:
        _serve(settings, listener, drain_s, terminal_closed())
        return
    share: dict[str, int | None] = {
        "threads": settings.threads or max(1, cpu_quota() // workers),
        "queue_size": max(1, settings.queue_size // workers),
        "rate_per_minute": settings.rate_per_minute and max(1, settings.rate_per_minute // workers),
    }
    # closed here too at a stop, or connections would be taken that no worker answers
    supervise(_worker, (settings.model_copy(update=share), listener, drain_s), workers, listener.close)


def _worker(settings: Settings, listener: socket.socket, drain_s: int) -> None:
    _set_up_logs()
    threading.Thread(target=_stop_without_supervisor, daemon=True).start()
    try:
        _serve(settings, listener, drain_s, lambda: False)  # the supervisor tells
    except ClipharError as error:
        print(f"cliphar: {error}", file=sys.stderr)
        sys.exit(1)


def _stop_without_supervisor() -> None:
    """Stop when the supervisor is gone: one that is killed tells nobody, and its workers would keep the port."""
    if supervisor := parent_process():
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _serve(settings: Settings, listener: socket.socket, drain_s: int, closed: Callable[[], bool]) -> None:
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _frame: early.append(number))  # until the loop listens to it
    app = create_app(Service.start(settings))
    body = settings.max_body_mb * 2**20
    config = uvicorn.Config(
        below(settings.root_path, app),
        # called, not made a subclass of; a body that comes late is answered 408 by then
        http=cast("type[Protocol]", partial(Protocol, request_s=2 * settings.deadline_s)),
        log_config=None,
        access_log=False,
        lifespan="off",  # there is none; a second Ctrl-C would leave its traceback
        server_header=False,
        timeout_graceful_shutdown=drain_s,
        timeout_keep_alive=75,  # longer than proxies keep theirs, so that they close first
        ws=cast("type[Streams]", partial(Streams, most=BODIES_AT_ONCE * body)),
        ws_max_size=body,
        ws_per_message_deflate=False,  # a photo gets no smaller, and a small message could be one that fills the memory
    )
    server = _Server(config, app, closed, early)
    recognizer = app.state.service.recognizer
    name, runtime = recognizer.bundle.info.name, recognizer.runtime.name
    del recognizer  # else the first model would stay in memory when another has taken its place
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    _log.info("ready", address=f"http://{host}:{port}", model=name, runtime=runtime, pid=os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        # one that comes before uvicorn listens to it; and uvicorn raises it again when all is answered: no failure
        signal.signal(number, server.stop)
    gc.collect()
    gc.freeze()  # what is here for good need not be looked through, each time for 50 ms in which nothing else runs
    gc.set_threshold(10_000)  # a request leaves no garbage, so that to look for it every 700 objects finds none
    # dup of one that came through pickle would make it blocking, in all workers: one would wait in accept for a next
    listener.setblocking(False)
    # libuv takes one connection a turn from each: in a busy loop, one of hundreds would wait until the others rest
    server.run(sockets=[listener, *(listener.dup() for _ in range(7))])
    app.state.service.engine.close()
    _log.info("stopped")


class _Server(uvicorn.Server):
    """Changes the model on SIGHUP, and says that it is not ready as soon as it is told to stop, while it answers."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, closed: Callable[[], bool], early: list[int]) -> None:
        super().__init__(config)
        self._app, self._terminal_closed, self._early = app, closed, early
        self._asked = asyncio.Event()

    def stop(self, *_: object) -> None:
        """Stop as soon as may be."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # a worker is started with it blocked
        if self._early:
            self._on_hangup()
        self._changing = asyncio.create_task(self._change_models())
        await super().startup(sockets)

    def _on_hangup(self) -> None:
        if self._terminal_closed():
            self.should_exit = True
        else:
            self._asked.set()

    async def _change_models(self) -> None:
        async with asyncio.TaskGroup() as leaving:
            while await self._asked.wait():
                self._asked.clear()  # one that comes from here on has the model loaded once more
                await self._change_model(leaving)

    async def _change_model(self, leaving: asyncio.TaskGroup) -> None:
        """Load the model anew beside the old one, which answers until then and finishes what it began."""
        old: Service = self._app.state.service
        try:
            new = await asyncio.to_thread(Service.start, old.settings, old.metrics)
        except Exception as error:
            unforeseen = None if isinstance(error, ClipharError) else error
            _log.error("not reloaded, the old model goes on", reason=str(error), exc_info=unforeseen)
            return
        if not old.ready:  # it was told to stop meanwhile
            return
        self._app.state.service = new
        _log.info("reloaded", model=new.recognizer.bundle.info.name)
        leaving.create_task(_let_go(old))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.service.ready = False
        if self.server_state.connections:
            # answers now say "Connection: close", so a caller's next request is not on a connection that we close
            await asyncio.sleep(_LAST_CALL_S)
        await super().shutdown(sockets)


async def _let_go(old: Service) -> None:
    """Close a service once it has finished what it began."""
    while old.users or old.engine.pending:
        await asyncio.sleep(0.1)
    await asyncio.to_thread(old.engine.close)  # it waits for work that nobody waits for any more


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        why = f"{error.strerror}; choose another --host or --port"
        raise UsageError(f"cannot listen on {host} port {port}: {why}") from error
    return listener


def _set_up_logs() -> None:
    """One JSON object a line on standard error, ours and the libraries'."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    lines = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, lines],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # a line in one write: workers share the stream
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(lines, foreign_pre_chain=shared))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
