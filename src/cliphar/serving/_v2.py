"""/v2: the open inference protocol (KServe v2), so that clients written for it work."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request, Response

from cliphar._version import __version__
from cliphar.errors import MediaError
from cliphar.labels import MAX_LABELS
from cliphar.serving._document import PROBLEM_RESPONSES, reference
from cliphar.serving._problems import ProblemError
from cliphar.serving._service import Service, TheService
from cliphar.serving._tensors import Infer, Wanted, images_of, pack, read_infer, texts_of

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["open inference protocol"], responses=PROBLEM_RESPONSES)
_VERSION = "1"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_DOCUMENTED: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": reference(Infer)}} | _BINARY,
        },
    },
    "responses": {200: {"content": _BINARY}},
}


@router.get("", name="v2_server")
async def server() -> dict[str, Any]:
    """The server's name, version and extensions."""
    return {"name": "cliphar", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/health/live", name="v2_live")
async def live() -> dict[str, bool]:
    """Whether the process answers."""
    return {"live": True}


@router.get("/health/ready", name="v2_ready")
async def ready(service: TheService) -> dict[str, bool]:
    """See /readyz."""
    if not service.ready:
        raise ProblemError(503, "the service is starting or stopping", retry_after_s=1)
    return {"ready": True}


def _check(service: Service, model: str, version: str = _VERSION) -> None:
    name = service.recognizer.bundle.info.name
    if model != name or version != _VERSION:
        raise ProblemError(404, f"no such model; here is '{name}', version {_VERSION}")


@router.get("/models/{model}", name="v2_model")
@router.get("/models/{model}/versions/{version}", name="v2_model_version")
async def metadata(model: str, service: TheService, version: str = _VERSION) -> dict[str, Any]:
    """The model's inputs and outputs."""
    _check(service, model, version)
    info = service.recognizer.bundle.info
    return {
        "name": info.name,
        "versions": [_VERSION],
        "platform": f"cliphar_{service.recognizer.runtime.name}",
        "inputs": [
            {"name": "images", "datatype": "BYTES", "shape": [-1]},
            {"name": "labels", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "score", "datatype": "FP32", "shape": [-1]},
            {"name": "labels", "datatype": "BYTES", "shape": [-1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "embeddings", "datatype": "FP32", "shape": [-1, info.embedding_dim]},
        ],
    }


@router.get("/models/{model}/ready", name="v2_model_ready")
@router.get("/models/{model}/versions/{version}/ready", name="v2_model_version_ready")
async def model_ready(model: str, service: TheService, version: str = _VERSION) -> dict[str, Any]:
    """Whether the model answers: status 200 or 503, as many clients look at no more."""
    _check(service, model, version)
    return {"name": model} | await ready(service)


@router.post("/models/{model}/infer", name="v2_infer", **_DOCUMENTED)
@router.post("/models/{model}/versions/{version}/infer", name="v2_infer_version", **_DOCUMENTED)
async def infer(
    model: str,
    request: Request,
    service: TheService,
    version: str = _VERSION,
    inference_header_content_length: Annotated[str | None, Header(pattern=r"^\d{1,9}$")] = None,
) -> Response:
    """Photos ``images`` (BYTES [N], base64 in JSON; or UINT8 [N,H,W,3]), and optionally ``labels`` (BYTES [C])."""
    _check(service, model, version)
    # on a thread, as what follows: with millions of numbers in JSON, or of labels, it takes seconds
    asked = await asyncio.to_thread(read_infer, await request.body(), inference_header_content_length)
    images, labels = asked.input("images"), asked.input("labels")
    if images is None or sorted(one.name for one in asked.inputs) not in (["images"], ["images", "labels"]):
        raise ProblemError(400, "the inputs are images and, if you like, labels")
    await service.refresh()
    chosen = None if labels is None else await asyncio.to_thread(lambda: service.labels(texts_of(labels)))
    own = service.recognizer.labels
    async with service.in_time():
        found = await service.embed(await asyncio.to_thread(images_of, images))
        bad = [one for one in found if isinstance(one, MediaError)]
        if bad:
            raise ProblemError(422, "; ".join(dict.fromkeys(str(one) for one in bad)))
        vectors = np.stack([one for one in found if not isinstance(one, MediaError)])
        predictions = await asyncio.to_thread(service.score, vectors, chosen, len(own) + MAX_LABELS, 0.9)
    scored = [dict(prediction.top) for prediction in predictions]
    names = [name for name in dict.fromkeys((*(chosen or own), *scored[0])) if name in scored[0]]  # taught meanwhile
    made: dict[str, Any] = {
        "label": [prediction.label for prediction in predictions],
        "score": np.array([prediction.score for prediction in predictions], np.float32),
        "labels": names,
        "scores": np.array([[row[name] for name in names] for row in scored], np.float32),
        "embeddings": vectors,
    }
    wanted = asked.outputs or [Wanted(name="label"), Wanted(name="score")]
    unknown = [output.name for output in wanted if output.name not in made]
    if unknown:
        raise ProblemError(400, f"no output {unknown[0]!r}; there are {', '.join(made)}")
    default = asked.parameters.get("binary_data_output", False)
    tensors = [(out.name, made[out.name], bool(out.parameters.get("binary_data", default))) for out in wanted]
    head = {"model_name": model, "model_version": _VERSION} | ({"id": asked.id} if asked.id else {})
    body, json_length = pack(head, tensors)
    if json_length is None:
        return Response(body, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(json_length)}
    return Response(body, media_type="application/octet-stream", headers=headers)
