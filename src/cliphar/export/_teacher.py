"""The real CLIP image tower behind the bundle's contract, without copying its weights.

The graph is rewritten to take uint8 pixels and to answer unit-length embeddings; its large tensors stay where they
are, inside the original file, and are read from there as ONNX external data at their byte offsets. So the part that
is shipped is small, and pulling the model is fetching one file.

The graph takes one photo at a time: its weights come with dynamic quantisation, whose scales are those of all that
is in a batch, and photos in one batch changed each other's embeddings (cosine 0.975 on average). It costs no speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from cliphar.export._float import fold
from cliphar.export._image import shorten_names
from cliphar.models import CLIP_DEVIATION, CLIP_MEAN

__all__ = ["TEACHER_SIZE", "export_teacher_graph", "teacher_tensors"]

TEACHER_SIZE = 224

_MEAN, _DEVIATION = np.array([CLIP_MEAN, CLIP_DEVIATION], np.float32)
_LARGE = 1024
_PREFIX = "vision_model."


def teacher_tensors(weights: Path) -> dict[str, NDArray[np.float32]]:
    """The tower's tensors in float32 by transformers' names, without ``vision_model.``; matrices are [out,in]."""
    model = onnx.load(weights)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {name.removeprefix(_PREFIX): value for name, value in stored.items() if name.startswith(_PREFIX)}
    found["embeddings.position_embedding.weight"] = found["embeddings.position_embedding.weight"].squeeze()
    for name, (matrix, scale) in _matrices(model).items():
        found[f"{name}.weight"] = np.ascontiguousarray((stored[matrix] * stored[scale]).T)
    return found


def export_teacher_graph(weights: Path, changes: Mapping[str, NDArray[np.float32]] | None = None) -> onnx.ModelProto:
    """``images`` uint8 RGB [1,224,224,3] -> ``embeddings`` float32 [1,512], unit length.

    Args:
        weights: CLIP's image tower, ``pixel_values`` float [N,3,224,224] -> ``image_embeds`` float [N,512]; the file
            must lie beside the returned graph, under the same name, when that is run.
        changes: other values for its tensors, float32, named as in ``teacher_tensors``, and ``NAME.scale`` [out],
            by which a matrix is multiplied. Each is kept as a difference in 8 bits, with one step for all of it.
    """
    content = weights.read_bytes()
    model = onnx.load_from_string(content)
    matrices = _matrices(model)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    differences: dict[str, NDArray[np.float32]] = {}
    for name, value in (changes or {}).items():
        matrix, _, kind = name.rpartition(".")
        tensor = stored[matrices[matrix][1] if kind == "scale" else _PREFIX + name]
        base = numpy_helper.to_array(tensor)
        differences[tensor.name] = base * (value - 1) if kind == "scale" else value - base
    before = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "pixel_scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "pixel_shift"], ["pixel_values"]),
    ]
    after = [helper.make_node("LpNormalization", ["image_embeds"], ["embeddings"], axis=-1, p=2)]
    graph.initializer.extend(
        [
            numpy_helper.from_array((1 / (255 * _DEVIATION)).reshape(1, 3, 1, 1), "pixel_scale"),
            numpy_helper.from_array((-_MEAN / _DEVIATION).reshape(1, 3, 1, 1), "pixel_shift"),
        ]
    )
    nodes = [*before, *graph.node, *after]
    _drop_zero_points(nodes, {tensor.name: tensor for tensor in graph.initializer})
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    size = TEACHER_SIZE
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, ["photos", size, size, 3]))
    graph.output.append(helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["photos", None]))
    model = fold(model)  # shapes are computed from the photos given: an export of this takes any number
    for tensor in model.graph.initializer:
        _refer(tensor, content, weights.name)
    for name, difference in differences.items():
        _add(model.graph, name, difference)
    shorten_names(model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def _matrices(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """The names of a matrix' 8-bit tensor and of its scale, by the path of what it belongs to."""
    scales = {node.name: node.input[1] for node in model.graph.node if node.name.endswith("_scales_mul")}
    return {
        node.name.removeprefix("/vision_model").removesuffix("/MatMul_quant").strip("/").replace("/", "."): (
            node.input[1],
            scales[f"{node.name}_scales_mul"],
        )
        for node in model.graph.node
        if node.op_type == "MatMulInteger"
    }


def _add(graph: onnx.GraphProto, name: str, difference: NDArray[np.float32]) -> None:
    """Have all that reads a tensor read the sum of it and ``difference``."""
    step = np.float32(max(np.abs(difference).max(), np.finfo(np.float32).tiny) / 127)
    for node in graph.node:
        node.input[:] = [f"{name}:sum" if given == name else given for given in node.input]
    rounded = np.rint(difference / step).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(rounded, f"{name}:steps"))
    graph.initializer.append(numpy_helper.from_array(np.array(step), f"{name}:step"))
    for node in (
        helper.make_node("Add", [name, f"{name}:difference"], [f"{name}:sum"]),
        helper.make_node("Mul", [f"{name}:float", f"{name}:step"], [f"{name}:difference"]),
        helper.make_node("Cast", [f"{name}:steps"], [f"{name}:float"], to=TensorProto.FLOAT),
    ):
        graph.node.insert(0, node)


def _drop_zero_points(nodes: list[onnx.NodeProto], tensors: dict[str, onnx.TensorProto]) -> None:
    """Leave out the weights' zero points, which are zero, as if they were not given."""
    for node in nodes:
        if node.op_type == "MatMulInteger" and not numpy_helper.to_array(tensors[node.input[3]]).any():
            del node.input[3]


def _refer(tensor: onnx.TensorProto, content: bytes, location: str) -> None:
    """Have a large tensor read from where it stands in the original file."""
    raw = tensor.raw_data or np.array(tensor.float_data, np.float32).tobytes()
    if len(raw) < _LARGE:
        return
    offset = content.find(raw)
    if offset < 0:
        raise ValueError(f"{tensor.name} is not stored as plain bytes in {location}")
    tensor.raw_data = raw
    set_external_data(tensor, location, offset=offset, length=len(raw))
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
