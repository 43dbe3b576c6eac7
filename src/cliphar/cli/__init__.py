"""The command line: thin commands over the library."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed on some input, 2 wrong usage, 128 + a signal."""
    try:
        from cliphar.cli._main import main as run
    except KeyboardInterrupt:  # while modules are loaded
        sys.exit(130)
    run()
