"""The open inference protocol (KServe v2), JSON and binary tensors, so that its clients work as they are.

https://github.com/kserve/open-inference-protocol and, for binary tensors, Triton's binary data extension.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from cliphar._version import __version__
from cliphar.errors import MediaError
from cliphar.serving._bodies import decode_base64
from cliphar.serving._problems import PROBLEM_RESPONSES, ProblemError
from cliphar.serving._service import Service, TheService

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["open inference protocol"], responses=PROBLEM_RESPONSES)
_HEADER = "Inference-Header-Content-Length"


class _Input(BaseModel):
    name: str
    shape: list[int] = Field(min_length=1)
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Output(BaseModel):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(BaseModel):
    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[_Input] = Field(min_length=1, max_length=1)
    outputs: list[_Output] | None = None


@router.get("")
async def server() -> dict[str, Any]:
    """The server's name and extensions."""
    return {"name": "cliphar", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(service: TheService) -> dict[str, bool]:
    """The model answers."""
    if not service.ready:
        raise ProblemError(503, "the service is starting or stopping", retry_after_s=1)
    return {"ready": True}


def _named(name: str, service: Service) -> None:
    own = service.recognizer.bundle.info.name
    if name != own:
        raise ProblemError(404, f"no model '{name}'; this service answers with '{own}'")


@router.get("/models/{name}/ready")
async def model_ready(name: str, service: TheService) -> dict[str, Any]:
    """The model answers."""
    _named(name, service)
    return {"name": name, **(await ready(service))}


@router.get("/models/{name}")
async def metadata(name: str, service: TheService) -> dict[str, Any]:
    """What the model takes and gives."""
    _named(name, service)
    info = service.recognizer.bundle.info
    side = info.image.size
    return {
        "name": name,
        "platform": "cliphar",
        "versions": [],
        "inputs": [
            {"name": "images", "datatype": "BYTES", "shape": [-1]},
            {"name": "images", "datatype": "UINT8", "shape": [-1, side, side, 3]},
        ],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "score", "datatype": "FP32", "shape": [-1]},
            {"name": "embeddings", "datatype": "FP32", "shape": [-1, info.embedding_dim]},
        ],
    }


@router.post(
    "/models/{name}/infer",
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": _Infer.model_json_schema()}}}
    },
)
async def infer(name: str, request: Request, service: TheService) -> Response:
    """``images`` as encoded photos (BYTES [N]; base64 in JSON) or as pixels (UINT8 [N,S,S,3]).

    Gives ``label``, ``score`` and ``embeddings``. The request's parameters may hold ``labels``, with commas between.
    """
    _named(name, service)
    asked, binary = _parse(await request.body(), request.headers.get(_HEADER))
    photos = _images(asked.inputs[0], binary, service.recognizer.bundle.info.image.size)
    labels = asked.parameters.get("labels")
    if labels is not None and not isinstance(labels, str):
        raise ProblemError(422, "the parameter labels must be a text, with commas between the labels")
    chosen = service.labels(labels)
    found = await service.embed(photos)
    for one in found:
        if isinstance(one, MediaError):
            raise one
    embeddings = np.stack([one for one in found if not isinstance(one, MediaError)])
    predictions = service.score(embeddings, chosen, 1, 0.9)
    results: dict[str, NDArray[Any]] = {
        "label": np.array([one.label for one in predictions], object),
        "score": np.array([one.score for one in predictions], np.float32),
        "embeddings": embeddings,
    }
    return _answer(name, asked, results)


def _parse(body: bytes, header: str | None) -> tuple[_Infer, bytes]:
    length = int(header) if header and header.isdigit() else len(body)
    try:
        return _Infer.model_validate_json(body[:length]), body[length:]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise ProblemError(422, f"{where}: {first['msg']}") from error


def _images(given: _Input, binary: bytes, side: int) -> list[bytes | NDArray[np.uint8]]:
    if given.name != "images":
        raise ProblemError(422, f"no input '{given.name}'; the input is 'images'")
    size = given.parameters.get("binary_data_size")
    if size is not None and size != len(binary):
        raise ProblemError(422, f"images has {len(binary)} bytes, not the {size} that were announced")
    if given.datatype == "BYTES" and len(given.shape) == 1:
        if size is not None:
            photos: list[bytes] = _unpack(binary)
        else:
            photos = [decode_base64(str(text)) for text in given.data or ()]
        if len(photos) != given.shape[0]:
            raise ProblemError(422, f"images has {len(photos)} elements, not the {given.shape[0]} of its shape")
        return list(photos)
    if given.datatype == "UINT8" and given.shape[1:] == [side, side, 3]:
        try:
            flat = np.frombuffer(binary, np.uint8) if size is not None else np.array(given.data, np.int64).ravel()
        except (ValueError, TypeError, OverflowError) as error:
            raise ProblemError(422, "images has data that are not numbers of its shape") from error
        if flat.size != int(np.prod(given.shape)) or (flat.size and (flat.min() < 0 or flat.max() > 255)):
            raise ProblemError(422, "images has not as many values of 0..255 as its shape says")
        return list(flat.astype(np.uint8).reshape(given.shape))
    raise ProblemError(422, f"images must be BYTES [N] or UINT8 [N,{side},{side},3]")


def _unpack(binary: bytes) -> list[bytes]:
    """Elements, each after its length in four bytes, little-endian."""
    elements, at = [], 0
    while at < len(binary):
        length = int.from_bytes(binary[at : at + 4], "little")
        elements.append(binary[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(binary):
        raise ProblemError(422, "images is cut short")
    return elements


def _answer(name: str, asked: _Infer, results: dict[str, NDArray[Any]]) -> Response:
    wanted = asked.outputs or [_Output(name=key) for key in results]
    always = asked.parameters.get("binary_data_output") is True
    rows, tail = [], b""
    for output in wanted:
        if output.name not in results:
            raise ProblemError(422, f"no output '{output.name}'; there are: {', '.join(results)}")
        values = results[output.name]
        text = values.dtype == object
        row: dict[str, Any] = {
            "name": output.name,
            "datatype": "BYTES" if text else "FP32",
            "shape": list(values.shape),
        }
        if output.parameters.get("binary_data", always):
            packed = _pack(values) if text else values.astype("<f4").tobytes()
            row["parameters"] = {"binary_data_size": len(packed)}
            tail += packed
        else:
            row["data"] = values.ravel().tolist()
        rows.append(row)
    document = {"model_name": name, "outputs": rows} | ({"id": asked.id} if asked.id else {})
    head = json.dumps(document).encode()
    if not tail:
        return Response(head, media_type="application/json")
    return Response(head + tail, media_type="application/octet-stream", headers={_HEADER: str(len(head))})


def _pack(values: NDArray[Any]) -> bytes:
    encoded = [str(value).encode() for value in values]
    return b"".join(len(one).to_bytes(4, "little") + one for one in encoded)
