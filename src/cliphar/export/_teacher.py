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
    for tensor in graph.initializer:
        raw = tensor.raw_data
        if len(raw) < _LARGE:
            continue
        offset = content.find(raw)
        if offset < 0:
            raise ValueError(f"{tensor.name} is not stored as plain bytes in {weights}")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", offset), ("length", len(raw))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    before = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT, name="pixels_to_float"),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2], name="channels_first"),
        helper.make_node("Mul", ["planes", "pixel_scale"], ["scaled"], name="scale_pixels"),
        helper.make_node("Add", ["scaled", "pixel_shift"], ["pixel_values"], name="shift_pixels"),
    ]
    after = [
        helper.make_node("LpNormalization", ["image_embeds"], ["embeddings"], axis=-1, p=2, name="unit_length"),
    ]
    graph.initializer.extend(
        [
            numpy_helper.from_array((1 / (255 * _DEVIATION)).reshape(1, 3, 1, 1), "pixel_scale"),
            numpy_helper.from_array((-_MEAN / _DEVIATION).reshape(1, 3, 1, 1), "pixel_shift"),
        ]
    )
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 224, 224, 3]))
    graph.output.append(helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [1, 512]))
    return model
