"""What /openapi.json says beyond the routes, so that generators make clients of it that people can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import HTTPConnection

__all__ = ["OPENAPI", "PROBLEM", "PROBLEM_RESPONSES", "Problem", "complete_document", "docs", "reference"]

PROBLEM = "application/problem+json"


class Problem(BaseModel):
    """Why a request was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    request_id: str = ""


def docs(asked: HTTPConnection) -> str:
    """Where the documentation is, behind a proxy too."""
    return f"{asked.scope['root_path']}/docs"


def reference(model: type[BaseModel]) -> dict[str, str]:
    """Where the document has the schema of a model that :func:`complete_document` was given."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


_RETRY = {"description": "With 429 and 503: seconds to wait before trying again.", "schema": {"type": "integer"}}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "headers": {"Retry-After": _RETRY},
        "content": {PROBLEM: {"schema": reference(Problem)}},
    }
    for status, description in (("4XX", "The request was refused."), ("5XX", "The service cannot answer now."))
}


def _operation_id(route: APIRoute) -> str:
    return route.name  # FastAPI's own is predict_v1_predict_post, the function's name in a client


OPENAPI: dict[str, Any] = {
    "title": "cliphar",
    "description": (
        "Recognise what people do in photos, clips and camera feeds. Name any actions in plain English.\n\n"
        "For a camera there is a WebSocket, `/v1/stream`, which OpenAPI cannot describe: see docs/serving.md."
    ),
    "license_info": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
    "openapi_tags": [
        {"name": "recognition", "description": "Photos and clips in, actions out; vocabularies and taught actions."},
        {"name": "open inference protocol", "description": "KServe v2, for clients such as Triton's."},
        {"name": "earlier clients", "description": "Kept for clients of an earlier generation."},
        {"name": "operations", "description": "Probes and metrics."},
    ],
    "generate_unique_id_function": _operation_id,
}


def complete_document(app: FastAPI, models: Iterable[type[BaseModel]], *, keys: bool, free: Iterable[str]) -> None:
    """Give the document the schemas of ``models``, which routes refer to, and the key where the service asks for one,
    as it does everywhere but at the paths ``free``."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            described: list[type[BaseModel]] = [Problem, *models]
            _, found = models_json_schema(
                [(model, "validation") for model in described], ref_template="#/components/schemas/{model}"
            )
            document["components"]["schemas"] |= found["$defs"]
            document["security"] = []
            if keys:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            for path in free:
                for operation in document["paths"].get(path, {}).values():
                    operation["security"] = []
        return app.openapi_schema or {}

    app.openapi = complete  # type: ignore[method-assign]  # as FastAPI has it done
