"""The command line: thin commands over the library."""

from cliphar.cli._main import main

__all__ = ["main"]
