"""The real CLIP image tower behind the bundle's contract, without copying its weights.

The graph is rewritten to take uint8 pixels and to answer unit-length embeddings; its large tensors stay where they
are, inside the original file, and are read from there as ONNX external data at their byte offsets. So the part that
is shipped is small, and pulling the model is fetching one file.

The graph takes one photo at a time: its weights come with dynamic quantisation, whose scales are those of all that
is in a batch, and photos in one batch changed each other's embeddings (cosine 0.975 on average). It costs no speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

__all__ = ["export_teacher_graph"]

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_LARGE = 1024


def export_teacher_graph(weights: Path) -> onnx.ModelProto:
    """``images`` uint8 RGB [1,224,224,3] -> ``embeddings`` float32 [1,512], unit length.

    Args:
        weights: CLIP's image tower, ``pixel_values`` float [N,3,224,224] -> ``image_embeds`` float [N,512]; the file
            must lie beside the returned graph, under the same name, when that is run.
    """
    content = weights.read_bytes()
    model = onnx.load_from_string(content)
    graph = model.graph
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
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for tensor in kept:
        _refer(tensor, content, weights.name)
    del graph.node[:], graph.initializer[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 224, 224, 3]))
    graph.output.append(helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [1, 512]))
    _shorten(model)
    return model


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


def _shorten(model: onnx.ModelProto) -> None:
    """Number the values instead of naming each by its path: most of what is left of the file are names."""
    graph = model.graph
    short = {"": ""} | {value.name: value.name for value in [*graph.input, *graph.output]}
    for tensor in graph.initializer:
        tensor.name = short.setdefault(tensor.name, f"w{len(short)}")
    for node in graph.node:
        node.name = ""
        node.input[:] = [short[name] for name in node.input]
        node.output[:] = [short.setdefault(name, f"v{len(short)}") for name in node.output]
