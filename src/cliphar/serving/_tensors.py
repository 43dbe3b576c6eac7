"""Tensors of the open inference protocol (KServe v2), as JSON and in its binary form.

https://github.com/kserve/open-inference-protocol, and the binary data extension that Triton's clients speak.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import from_json

from cliphar.serving._problems import ProblemError, said

__all__ = ["Infer", "Wanted", "images_of", "pack", "read_infer", "texts_of"]

_MOST = 8  # tensors of a request or an answer; ours have five names
# what Triton offers besides: an answer without it would be taken for what was asked
_NOT_OFFERED = {
    "classification": "take the outputs labels and scores",
    "shared_memory_region": "send and take tensors in the body",
}
_Size = Annotated[int, Field(ge=1, le=1_000_000)]


class Tensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    shape: Annotated[list[_Size], FailFast(), Field(min_length=1, max_length=4)]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None
    raw: SkipJsonSchema[bytes | None] = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Wanted(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="forbid")

    name: str
    parameters: dict[str, Any] = {}


class Infer(BaseModel):
    """An inference request."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[Tensor], FailFast(), Field(min_length=1, max_length=_MOST)]
    outputs: Annotated[list[Wanted], FailFast(), Field(max_length=_MOST)] = []

    def input(self, name: str) -> Tensor | None:
        """The input of that name, if it was sent."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)


def read_infer(body: bytes, header_length: str | None) -> Infer:
    """The request; binary tensors follow the first ``header_length`` bytes, which are JSON.

    Raises:
        ProblemError: 400 if it is not as the protocol says.
    """
    try:
        cut = len(body) if header_length is None else int(header_length)
        if not 0 <= cut <= len(body):
            raise ValueError("Inference-Header-Content-Length is longer than the body")
        content = from_json(body[:cut])
        for tensor in content.get("inputs", []):
            tensor.pop("raw", None)
        infer = Infer.model_validate(content)
    except ValidationError as error:
        if (count := error.error_count()) > 1000:  # names that there are not; to list millions takes minutes
            raise ProblemError(400, f"{count:,} things are wrong; see docs/serving.md") from error
        raise ProblemError(400, said(error, "docs/serving.md")) from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ProblemError(400, f"the request is not JSON of the open inference protocol: {error}") from error
    named: list[Tensor | Wanted] = [*infer.inputs, *infer.outputs]
    for one in named:
        for name, instead in _NOT_OFFERED.items():
            if name in one.parameters:
                raise ProblemError(400, f"{one.name}: {name} is not offered here; {instead}")
    at = cut
    for tensor in infer.inputs:
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            continue
        if not isinstance(size, int) or not 0 <= size <= len(body) - at:
            raise ProblemError(400, f"input {tensor.name}: binary_data_size {size!r} is not what the body holds")
        tensor.raw = body[at : at + size]
        at += size
    if at < len(body):
        raise ProblemError(400, f"{len(body) - at} bytes of the body are no input's; see binary_data_size")
    return infer


def _strings(tensor: Tensor) -> list[bytes | str]:
    if tensor.datatype != "BYTES" or len(tensor.shape) > 2:
        raise ProblemError(400, f"input {tensor.name} must be BYTES [N]")
    found: list[bytes | str] = []
    if tensor.raw is None:
        found = [item for row in tensor.data or [] for item in (row if isinstance(row, list) else [row])]
        if not all(isinstance(item, str) for item in found):
            raise ProblemError(400, f"input {tensor.name}: data must be texts")
    else:
        at = 0
        while at + 4 <= len(tensor.raw):
            (size,) = struct.unpack_from("<I", tensor.raw, at)
            found.append(tensor.raw[at + 4 : at + 4 + size])
            at += 4 + size
        if at != len(tensor.raw):
            raise ProblemError(400, f"input {tensor.name}: the binary data is cut short")
    if len(found) != tensor.elements:
        raise ProblemError(400, f"input {tensor.name} has {len(found)} elements, its shape says {tensor.elements}")
    return found


def texts_of(tensor: Tensor) -> list[str]:
    """The texts of a BYTES tensor; ProblemError 400 if it is none."""
    try:
        return [item.decode() if isinstance(item, bytes) else item for item in _strings(tensor)]
    except UnicodeDecodeError as error:
        raise ProblemError(400, f"input {tensor.name} is not UTF-8 text") from error


def images_of(tensor: Tensor) -> list[bytes]:
    """Encoded photos of a BYTES [N] tensor (base64 in JSON), or of pixels, UINT8 [N,H,W,3], as PPM."""
    if tensor.datatype == "BYTES":
        try:
            return [
                item if isinstance(item, bytes) else base64.b64decode(item, validate=True) for item in _strings(tensor)
            ]
        except ValueError as error:
            raise ProblemError(400, f"input {tensor.name}: a photo in JSON must be base64") from error
    if tensor.datatype != "UINT8" or len(tensor.shape) != 4 or tensor.shape[3] != 3:
        raise ProblemError(400, f"input {tensor.name} must be BYTES [N] or UINT8 [N,H,W,3]")
    try:
        if tensor.raw is None:
            pixels = np.asarray(tensor.data)
            if pixels.dtype.kind != "i" or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError  # 0..1 would all be black
            pixels = pixels.astype(np.uint8)
        else:
            pixels = np.frombuffer(tensor.raw, np.uint8)
        pixels = pixels.reshape(tensor.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProblemError(
            400, f"input {tensor.name} must be whole numbers 0..255, as many as its shape says"
        ) from error
    _, height, width, _ = tensor.shape
    return [b"P6 %d %d 255\n" % (width, height) + image.tobytes() for image in pixels]


def pack(
    head: dict[str, Any], tensors: Sequence[tuple[str, NDArray[np.float32] | list[str], bool]]
) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON if binary tensors follow; (name, FP32 or texts, binary)."""
    outputs: list[dict[str, Any]] = []
    tail = bytearray()
    for name, values, binary in tensors:
        texts = isinstance(values, list)
        shape = [len(values)] if isinstance(values, list) else list(values.shape)
        output: dict[str, Any] = {"name": name, "datatype": "BYTES" if texts else "FP32", "shape": shape}
        if not binary:
            output["data"] = values if isinstance(values, list) else values.ravel().tolist()
        else:
            if isinstance(values, list):
                encoded = [value.encode() for value in values]
                raw = b"".join(struct.pack("<I", len(item)) + item for item in encoded)
            else:
                raw = values.astype("<f4").tobytes()
            output["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        outputs.append(output)
    header = json.dumps(head | {"outputs": outputs}, ensure_ascii=False).encode()
    return header + tail, len(header) if tail else None
