"""The HTTP API: a recogniser behind a batching engine."""

from cliphar.serving._app import create_app
from cliphar.serving._engine import Engine
from cliphar.serving._run import run
from cliphar.serving._service import Service
from cliphar.serving._settings import Settings

__all__ = ["Engine", "Service", "Settings", "create_app", "run"]
