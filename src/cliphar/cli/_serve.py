"""cliphar serve: the HTTP API."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from cliphar.cli._options import Drain, Host, Model, Provider, RootPath, Runtime, Threads
from cliphar.errors import UsageError
from cliphar.labels import MAX_LABELS

__all__ = ["serve"]


def _origins(given: str) -> tuple[str, ...]:
    origins = tuple(origin for one in given.split(",") if (origin := one.strip().rstrip("/").lower()))
    for origin in origins:  # one that is written otherwise than by browsers would match none
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
            raise UsageError(f"--cors: {origin!r} is no page's origin; one is like https://page.example, and * is all")
    return origins


def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="CLIPHAR_PORT", min=0, max=65535, help="Port to listen on.")] = 8000,
    runtime: Runtime = None,
    provider: Provider = None,
    threads: Threads = None,
    workers: Annotated[
        int,
        typer.Option(envvar="CLIPHAR_WORKERS", min=1, max=64, help="Processes, each with its own copy of the model."),
    ] = 1,
    state: Annotated[
        Path | None, typer.Option(envvar="CLIPHAR_STATE", help="Where vocabularies and taught actions are kept.")
    ] = None,
    queue_size: Annotated[int, typer.Option(envvar="CLIPHAR_QUEUE_SIZE", min=1, help="Photos that may wait.")] = 256,
    max_batch: Annotated[
        int,
        typer.Option(envvar="CLIPHAR_MAX_BATCH", min=1, max=256, help="Photos given to the model at once, at most."),
    ] = 16,
    keep: Annotated[
        int,
        typer.Option(
            "--keep-photos",
            envvar="CLIPHAR_KEEP_PHOTOS",
            min=0,
            help="Photos whose embeddings are kept, so that asking again does not run the model.",
        ),
    ] = 1024,
    deadline: Annotated[
        float, typer.Option(envvar="CLIPHAR_DEADLINE_S", min=0.001, help="Seconds a request may take.")
    ] = 30.0,
    drain: Drain = 30,
    max_body: Annotated[
        int, typer.Option(envvar="CLIPHAR_MAX_BODY_MB", min=1, help="Largest request body, in MB.")
    ] = 64,
    max_images: Annotated[
        int, typer.Option(envvar="CLIPHAR_MAX_IMAGES", min=1, help="Photos allowed per request.")
    ] = 64,
    max_pixels: Annotated[
        int, typer.Option(envvar="CLIPHAR_MAX_PIXELS", min=1, help="Largest photo, in pixels.")
    ] = 50_000_000,
    max_labels: Annotated[
        int, typer.Option(envvar="CLIPHAR_MAX_LABELS", min=1, max=MAX_LABELS, help="Labels allowed per request.")
    ] = 500,
    api_keys: Annotated[
        Path | None, typer.Option(envvar="CLIPHAR_API_KEYS", help="Require keys: a file of 'NAME SHA256' lines.")
    ] = None,
    rate: Annotated[
        int | None,
        typer.Option(
            envvar="CLIPHAR_RATE_PER_MINUTE", min=1, help="Requests allowed per minute from one key or address."
        ),
    ] = None,
    cors: Annotated[
        str | None,
        typer.Option(envvar="CLIPHAR_CORS_ORIGINS", help="Origins of web pages that may call, comma-separated."),
    ] = None,
    root_path: RootPath = "",
    image_urls: Annotated[
        bool,
        typer.Option("--image-urls", envvar="CLIPHAR_IMAGE_URLS", help="Fetch images from public URLs in requests."),
    ] = False,
) -> None:
    """Start the HTTP API. Its documentation is at /docs."""
    if find_spec("fastapi") is None or find_spec("structlog") is None:
        raise UsageError("the API needs FastAPI and others; run: pip install 'cliphar[serve]'")
    with tempfile.TemporaryDirectory(prefix="cliphar-metrics-") if workers > 1 else nullcontext() as shared:
        if shared:
            # read when prometheus-client is imported: the workers' counts are added up there
            os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", shared)
        # read when websockets is imported: the labels of WS /v1/stream are in its address
        os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", str(2**17))
        from cliphar.serving import Settings, run

        given = {"state": state} if state else {}
        settings = Settings(
            model=model,
            runtime=runtime,
            provider=provider,
            threads=threads,
            queue_size=queue_size,
            max_batch=max_batch,
            keep_photos=keep,
            deadline_s=deadline,
            max_body_mb=max_body,
            max_images=max_images,
            max_pixels=max_pixels,
            max_labels=max_labels,
            api_keys=api_keys,
            rate_per_minute=rate,
            cors_origins=_origins(cors or ""),
            root_path=root_path,
            image_urls=image_urls,
            **given,
        )
        run(settings, host, port, drain, workers)
