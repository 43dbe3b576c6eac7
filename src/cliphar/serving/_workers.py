"""Several processes on one socket: started, kept alive, told to stop and to change the model together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from typing import Any

import structlog
from prometheus_client import multiprocess

from cliphar.errors import ClipharError

__all__ = ["supervise", "terminal_closed"]

# one that ends sooner, or by an error of its own, was not able to start and would not be the next time
_START_S = 5.0


def supervise(
    target: Callable[..., None], arguments: tuple[Any, ...], count: int, let_go: Callable[[], None] = lambda: None
) -> None:
    """Run ``target(*arguments)`` in ``count`` processes until SIGTERM or SIGINT; SIGHUP is passed on.

    ``let_go`` is called when they are told to stop and none will be started any more.

    Raises:
        ClipharError: one ended as it started.
    """
    context, log = get_context("spawn"), structlog.get_logger()
    workers: dict[int, tuple[SpawnProcess, float]] = {}
    stopping = starting = False

    def start() -> None:
        nonlocal starting
        starting = True
        if not stopping:
            process = context.Process(target=target, args=arguments)
            # in the worker too, until it listens to it: before that it would end it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            workers[process.sentinel] = (process, time.monotonic())
        starting = False
        if stopping:  # since it was told to start
            end()

    def tell(number: int) -> None:
        for process, _ in workers.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def end() -> None:
        nonlocal stopping
        stopping = True
        tell(signal.SIGTERM)
        if not starting:
            let_go()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end())
    closed = terminal_closed()
    signal.signal(signal.SIGHUP, lambda number, _frame: end() if closed() else tell(number))
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
                failed = True
                end()
            else:
                log.error("a worker ended and is started anew", pid=process.pid, exit=process.exitcode)
                start()
    if failed:
        raise ClipharError("a worker ended as it started; its line above says why")


def terminal_closed() -> Callable[[], bool]:
    """A function to ask at a SIGHUP: whether the terminal was closed, or else the model is to be changed."""
    had = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _terminal()  # ignored: nohup
    return lambda: had and not _terminal()


def _terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError:
        return False
    return True
