"""A service on a socket, from start to the last answer."""

from __future__ import annotations

import logging
import signal
import socket
import sys

import structlog
import uvicorn

from cliphar.errors import UsageError
from cliphar.serving._app import create_app
from cliphar.serving._service import Service
from cliphar.serving._settings import Settings

__all__ = ["run"]


def run(settings: Settings, host: str, port: int, drain_s: int) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has come in, for at most ``drain_s`` seconds.

    Raises:
        UsageError: the address cannot be listened on.
        ClipharError: the model cannot be loaded.
    """
    _set_up_logs()
    listener = _listen(host, port)
    service = Service.start(settings)
    log = structlog.get_logger()
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
        ws_max_size=settings.max_body_mb * 2**20,
    )
    server = _Server(config, service)
    name, runtime = service.recognizer.bundle.info.name, service.recognizer.runtime.name
    log.info("ready", address=f"http://{host}:{listener.getsockname()[1]}", model=name, runtime=runtime)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when all is answered: that is no failure
        signal.signal(number, lambda _number, _frame: None)
    server.run(sockets=[listener])
    service.engine.close()
    log.info("stopped")


class _Server(uvicorn.Server):
    """Says that it is not ready as soon as it is told to stop, while it still answers."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.ready = False
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return listener


def _set_up_logs() -> None:
    """One JSON object a line on standard error, ours and the libraries'."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
