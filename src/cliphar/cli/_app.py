"""cliphar app: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from cliphar.cli._options import BasePath, Model, PagePort, an_address

__all__ = ["page"]


def page(
    host: Annotated[
        str, typer.Option(envvar="CLIPHAR_APP_HOST", help="Address to listen on.", callback=an_address)
    ] = "127.0.0.1",
    port: PagePort = 8501,
    api: Annotated[
        str | None,
        typer.Option(
            envvar="CLIPHAR_API_URL", help="URL of a running 'cliphar serve' to ask.", show_default="answer by itself"
        ),
    ] = None,
    model: Model = None,
    base_path: BasePath = "",
) -> None:
    """Start the web page: photos, video, camera, teaching."""
    from cliphar.ui import launch

    launch(host, port, api=api, model=model, base_path=base_path)
