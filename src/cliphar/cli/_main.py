"""The commands' registry, and errors as one line."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import typer

from cliphar._version import __version__
from cliphar.cli import _app, _bench, _data, _doctor, _eval, _export, _model, _predict, _serve, _train, _up, _video
from cliphar.cli._output import Commands, escaping, tell, while_read
from cliphar.errors import ClipharError, UsageError

__all__ = ["main"]

# typer names no base of its usage errors
_WrongUsage: type[Any] = typer.BadParameter.__mro__[1]
_GRACE_S = 5.0  # below the 10 that docker stop gives


app = typer.Typer(
    name="cliphar",
    cls=Commands,
    help="Recognise what people do in photos, videos and camera feeds. Name any actions in plain English.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("predict")(_predict.predict)
app.command("video")(_video.video)
app.command("eval")(_eval.evaluate)
app.command("train")(_train.train)
app.command("export")(_export.export)
app.command("bench")(_bench.bench)
app.command("serve")(_serve.serve)
app.command("app")(_app.page)
app.command("up")(_up.up)
app.command("doctor")(_doctor.doctor)
app.add_typer(_model.app, name="model")
app.add_typer(_data.app, name="data")


def _version(value: bool) -> None:
    if value:
        print(f"cliphar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _end(line: object, status: int) -> NoReturn:
    tell(str(line))
    sys.exit(status)


def _run() -> Any:
    """The status that typer gives, and its status of Ctrl-C where that comes before typer looks for it."""
    try:
        return app(standalone_mode=False)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if _breaks_off_loading(error):
            return 128 + signal.SIGINT
        raise


def _breaks_off_loading(error: BaseException | None) -> bool:
    """Whether Ctrl-C met a library that was being loaded: one in C makes an ImportError of it."""
    while error is not None:
        cause = error.__cause__ or error.__context__
        if isinstance(error, ImportError) and isinstance(cause, KeyboardInterrupt):
            return True
        error = cause
    return False


def _leave_within(seconds: float, status: int) -> None:
    """End so much later, or at the next signal: Python waits for threads, and one may be in a read that never ends."""
    end = threading.Timer(seconds, os._exit, [status])
    end.daemon = True
    end.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(status))


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed on some input, 2 wrong usage, 128 + a signal."""
    stopped: list[int] = []

    def stop(number: int, _frame: object) -> None:  # the same way out as Ctrl-C: what was done is written
        stopped.append(number)
        if number != signal.SIGTERM:  # a closing terminal sends it, and so does its shell
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, stop)
    # the shell's >&- and 2>&-: printed to None, a line goes to the other
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=escaping())
    try:
        status = _run()
        if status == 128 + signal.SIGINT:
            status = 128 + stopped[0] if stopped else status
            _leave_within(_GRACE_S, status)
        with suppress(typer.Exit), while_read():  # what Python would write only while it ends
            sys.stdout.flush()
        sys.exit(status)
    except _WrongUsage as error:
        if "Usage:" in error.format_message():  # no arguments: it is the help
            error.show()
            sys.exit(2)
        see = f"; see '{error.ctx.command_path} --help'" if error.ctx else ""  # an option's value left out: no ctx
        _end(error.format_message().rstrip(".") + see, 2)
    except ClipharError as error:
        _end(error, 2 if isinstance(error, UsageError) else 1)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):  # Python has no class for it
            raise
        _end("no more threads may be started; raise 'ulimit -u', or docker's --pids-limit", 1)
    except OSError as error:
        with suppress(OSError):
            sys.stdout.close()  # else tried again at the very end
        denied = isinstance(error, PermissionError)  # perhaps to read
        way = "let this user read it, or write there" if denied else "see that there is room and permission to write"
        _end(f"{error}; {way}", 1)
