"""Start Streamlit on the page, in place of this process."""

from __future__ import annotations

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from cliphar.errors import UsageError

__all__ = ["launch"]

MAX_UPLOAD_MB = 500

_OPTIONS = {
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": str(MAX_UPLOAD_MB),
    "server.enableStaticServing": "false",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    "logger.hideWelcomeMessage": "true",
    "theme.font": "sans-serif",
    "theme.baseRadius": "0.6rem",
    "theme.light.primaryColor": "#0b7a75",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f2f5f5",
    "theme.light.textColor": "#17252a",
    "theme.dark.primaryColor": "#118a81",
    "theme.dark.backgroundColor": "#10181b",
    "theme.dark.secondaryBackgroundColor": "#1b262a",
    "theme.dark.textColor": "#e8f0ef",
}


def launch(host: str, port: int, *, api: str | None = None, model: str | None = None) -> None:
    """Serve the page on ``host:port`` until SIGTERM or SIGINT; does not return.

    Args:
        host: the address to listen on.
        port: the port.
        api: the address of a ``cliphar serve`` that answers; None runs the recogniser in the page's own process.
        model: the model's name or its bundle's path, where no API answers.

    Raises:
        UsageError: Streamlit is not installed, or the port is taken.
    """
    if find_spec("streamlit") is None:
        raise UsageError("the page needs Streamlit; run: pip install 'cliphar[app]'")
    _check_port(host, port)
    settings = {"CLIPHAR_API_URL": api, "MODEL_PATH": model}
    environment = {k: v for k, v in os.environ.items() if k not in settings and not k.startswith("STREAMLIT_")}
    environment |= {name: value for name, value in settings.items() if value}
    flags = _OPTIONS | {"server.address": host, "server.port": str(port)}
    command = [sys.executable, "-m", "cliphar.ui._serve", "run", str(Path(__file__).with_name("_app.py"))]
    command += [f"--{name}={value}" for name, value in flags.items()]
    shown = f"[{host}]" if ":" in host else host
    print(f"cliphar: the page is on http://{shown}:{port}; Ctrl+C stops it", file=sys.stderr, flush=True)
    os.execve(sys.executable, command, environment)  # noqa: S606 - the signals then reach Streamlit itself


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
