"""Start Streamlit on the page, in place of this process."""

from __future__ import annotations

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from cliphar.bundle import find_bundle
from cliphar.errors import UsageError

__all__ = ["api_key", "ice_servers", "launch", "past_proxies", "require_streamlit"]

MAX_UPLOAD_MB = 500
# what both browsers and aiortc read
_ADDRESS = r"^(stuns?:[^?:\s]+(:\d+)?|turns?:[^?:\s]+(:\d+)?(\?transport=(udp|tcp))?)$"

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
    "theme.dark.primaryColor": "#0f837b",
    "theme.dark.backgroundColor": "#10181b",
    "theme.dark.secondaryBackgroundColor": "#1b262a",
    "theme.dark.textColor": "#e8f0ef",
}


def require_streamlit() -> None:
    """UsageError, with the command that mends it, unless Streamlit is installed."""
    if find_spec("streamlit") is None:
        raise UsageError("the page needs Streamlit; run: pip install 'cliphar[app]'")


def past_proxies(host: str) -> dict[str, str]:
    """The variables by which ``host`` is asked itself, whatever proxy is there for others."""
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host]))
    return {"no_proxy": direct, "NO_PROXY": direct}


def launch(host: str, port: int, *, api: str | None = None, model: str | None = None, base_path: str = "") -> None:
    """Serve the page on ``host:port`` until SIGTERM or SIGINT; does not return.

    Args:
        host: the address to listen on.
        port: the port.
        api: the address of a ``cliphar serve`` that answers; None runs the recogniser in the page's own process.
        model: the model's name or its bundle's path, where no API answers.
        base_path: the path under which a proxy, which passes it on, has the page: ``/cliphar``.

    Raises:
        UsageError: Streamlit is not installed, the port is taken, or CLIPHAR_ICE_SERVERS, ``api`` or the file of
            its key is wrong.
        BundleError: there is no such model.
    """
    require_streamlit()
    _check_port(host, port)
    ice_servers()
    # what is wrong is said here, as by serve, and not to every visitor
    if api:
        from cliphar.client import Client

        Client(api, api_key=api_key()).close()
    else:
        find_bundle(model, verify=False)  # the page reads it whole
    settings = {"CLIPHAR_API_URL": api, "MODEL_PATH": model}
    environment = {k: v for k, v in os.environ.items() if k not in settings and not k.startswith("STREAMLIT_")}
    environment |= {name: value for name, value in settings.items() if value}
    near = urlsplit(api or "").hostname or ""
    if near in ("localhost", "::1") or near.startswith("127."):
        environment |= past_proxies(near)
    flags = _OPTIONS | {"server.address": host, "server.port": str(port), "server.baseUrlPath": base_path}
    command = [sys.executable, "-m", "cliphar.ui._serve", "run", str(Path(__file__).with_name("_app.py"))]
    command += [f"--{name}={value}" for name, value in flags.items()]
    shown = f"[{host}]" if ":" in host else host
    print(f"cliphar: the page is on http://{shown}:{port}{base_path}; Ctrl+C stops it", file=sys.stderr, flush=True)
    os.execve(sys.executable, command, environment)  # noqa: S606 - the signals then reach Streamlit itself


class _IceServer(BaseModel):
    urls: Annotated[list[Annotated[str, Field(pattern=_ADDRESS)]], Field(min_length=1)]
    username: str | None = None
    credential: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        one = isinstance(given, dict) and isinstance(given.get("urls"), str)
        return given | {"urls": [given["urls"]]} if one else given

    @model_validator(mode="after")
    def _turn_has_a_credential(self) -> _IceServer:
        if any(url.startswith("turn") for url in self.urls) and not (self.username and self.credential):
            raise ValueError("browsers refuse it")
        return self


def ice_servers() -> list[dict[str, Any]]:
    """The servers of CLIPHAR_ICE_SERVERS as RTCIceServer dictionaries; UsageError if it is wrong."""
    given = os.environ.get("CLIPHAR_ICE_SERVERS", "").strip()
    try:
        if given.startswith("["):
            servers = TypeAdapter(list[_IceServer]).validate_json(given)
        else:
            servers = [_IceServer(urls=[url.strip()]) for url in given.split(",") if url.strip()]
    except ValidationError:
        raise UsageError(
            "CLIPHAR_ICE_SERVERS is neither stun: addresses with commas between nor a JSON list such as "
            '[{"urls": "turn:HOST:3478", "username": "U", "credential": "C"}]; turn: needs its username and credential'
        ) from None  # the cause has the credential
    return [server.model_dump(exclude_none=True) for server in servers]


def api_key() -> str | None:
    """The key that the page shows the service; None without one.

    Raises:
        UsageError: the file of CLIPHAR_API_KEY_FILE cannot be read.
    """
    file = os.environ.get("CLIPHAR_API_KEY_FILE")
    if not file:
        return os.environ.get("CLIPHAR_API_KEY") or None
    try:
        return Path(file).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the key in {file}, which CLIPHAR_API_KEY_FILE names: {error}") from error


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
