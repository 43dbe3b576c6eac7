"""The application: routes, and what is around them."""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST

from cliphar._version import __version__
from cliphar.serving import _legacy, _open_inference, _routes
from cliphar.serving._keys import Keys
from cliphar.serving._middleware import Around
from cliphar.serving._problems import ProblemError, add_problem_handlers
from cliphar.serving._service import Service, TheService

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a started service."""
    app = FastAPI(
        title="cliphar",
        version=__version__,
        description="What are the people in this picture doing? Actions in plain words, without retraining.",
    )
    app.state.service = service
    add_problem_handlers(app)
    settings = service.settings
    app.add_middleware(Around, service=service, keys=Keys(settings.api_keys, settings.rate_per_minute))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )

    @app.get("/livez", tags=["operations"])
    async def livez() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"])
    async def readyz(service: TheService) -> dict[str, str]:
        """The model is loaded and has run once; 503 while the service stops."""
        if not service.ready:
            raise ProblemError(503, "the service is starting or stopping", retry_after_s=1)
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"])
    async def metrics(service: TheService) -> Response:
        """Prometheus text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(_routes.router)
    app.include_router(_open_inference.router)
    app.include_router(_legacy.router)
    return app
