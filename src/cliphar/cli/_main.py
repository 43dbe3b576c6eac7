"""The commands' registry, and errors as one line."""

from __future__ import annotations

import sys
from contextlib import suppress

import typer

from cliphar._version import __version__
from cliphar.cli import _doctor, _eval, _model, _predict, _train
from cliphar.errors import ClipharError, UsageError

__all__ = ["main"]

app = typer.Typer(
    name="cliphar",
    help="What are the people in this picture doing? Actions in plain words, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("predict")(_predict.predict)
app.command("eval")(_eval.evaluate)
app.command("train")(_train.train)
app.command("doctor")(_doctor.doctor)
app.add_typer(_model.app, name="model")


def _version(value: bool) -> None:
    if value:
        print(f"cliphar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed on some input, 2 wrong usage."""
    try:
        app()
    except UsageError as error:
        print(f"cliphar: {error}", file=sys.stderr)
        sys.exit(2)
    except ClipharError as error:
        print(f"cliphar: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("cliphar: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as in "| head"
        sys.exit(0)
    except OSError as error:
        print(f"cliphar: {error}; see that there is room and permission to write", file=sys.stderr)
        with suppress(OSError):
            sys.stdout.close()  # else it is tried again, and complained of, at the very end
        sys.exit(1)
