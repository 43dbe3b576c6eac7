"""The application: routes, and what is around them."""

from __future__ import annotations

import os

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from cliphar._version import __version__
from cliphar.errors import UsageError
from cliphar.serving import _legacy, _routes, _stream, _v2, _video
from cliphar.serving._bodies import Asked
from cliphar.serving._document import OPENAPI, PROBLEM_RESPONSES, complete_document
from cliphar.serving._keys import Keys
from cliphar.serving._middleware import OPEN, Around
from cliphar.serving._problems import ProblemError, add_problem_handlers
from cliphar.serving._service import Service, TheService
from cliphar.serving._tensors import Infer

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a started service."""
    app = FastAPIOffline(  # /docs works with no network, and tells nobody who reads it
        redoc_url=None,  # it would: its logo comes from elsewhere
        version=__version__,
        **OPENAPI,
    )
    app.state.service = service
    add_problem_handlers(app)
    settings = service.settings
    app.add_middleware(Around, owner=app, keys=Keys(settings.api_keys, settings.rate_per_minute))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID", "Inference-Header-Content-Length"],
        )

    @app.get("/livez", tags=["operations"])
    async def livez() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"], responses={503: PROBLEM_RESPONSES["5XX"]})
    async def readyz(service: TheService) -> dict[str, str]:
        """The model is loaded and has run once; 503 while the service stops."""
        if not service.ready:
            raise ProblemError(503, "the service is starting or stopping", retry_after_s=1)
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics(service: TheService) -> Response:
        """Prometheus text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(_routes.router)
    app.include_router(_video.router)
    app.include_router(_stream.router)
    app.include_router(_v2.router)
    app.include_router(_legacy.router)
    complete_document(app, [Asked, Infer], keys=settings.api_keys is not None, free=OPEN)
    _trace(app)
    return app


def _trace(app: FastAPI) -> None:
    """OpenTelemetry, where its variables ask for it."""
    if not any(os.environ.get(f"OTEL_EXPORTER_OTLP_{part}ENDPOINT") for part in ("", "TRACES_")):
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError("OTEL_EXPORTER_OTLP_ENDPOINT is set; run: pip install 'cliphar[otel]', or unset it") from error
    resource = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "cliphar")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="livez,readyz,metrics,health")
