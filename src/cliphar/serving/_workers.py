"""Several processes on one socket: started, kept alive, told to stop and to change the model together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import structlog
from prometheus_client import multiprocess

from cliphar.errors import ClipharError

__all__ = ["supervise"]

# one that ends sooner, or by an error of its own, was not able to start and would not be the next time
_START_S = 5.0


def supervise(target: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Run ``target(*arguments)`` in ``count`` processes until SIGTERM or SIGINT; SIGHUP is passed on.

    Raises:
        ClipharError: one ended as it started.
    """
    context, log = get_context("spawn"), structlog.get_logger()
    workers: dict[int, tuple[SpawnProcess, float]] = {}
    stopping = False

    def start() -> None:
        process = context.Process(target=target, args=arguments)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # in the worker, until it listens: it would end it
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        workers[process.sentinel] = (process, time.monotonic())
        if stopping:  # since it was told to start
            tell(signal.SIGTERM)

    def tell(number: int) -> None:
        for process, _ in workers.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        tell(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, lambda number, _frame: tell(number))
    for _ in range(count):
        start()
    failed = False
    while workers:
        ended = connection.wait(list(workers))
        for sentinel in [known for known in workers if known in ended]:
            process, since = workers.pop(sentinel)
            process.join()
            multiprocess.mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
            if stopping:
                continue
            if process.exitcode == 1 or time.monotonic() - since < _START_S:
                stopping = failed = True
                tell(signal.SIGTERM)
            else:
                log.error("a worker ended and is started anew", pid=process.pid, exit=process.exitcode)
                start()
    if failed:
        raise ClipharError("a worker ended as it started; its line above says why")
