"""Floating-point operations of a graph's convolutions and matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["count_flops"]


def count_flops(model: onnx.ModelProto, size: int) -> float:
    """Operations for one photo, a multiplication and its addition being two; element-wise work is not counted.

    Args:
        model: a float graph, ``images`` uint8 [N,size,size,3]. It is run once to learn every shape.
        size: the side of a photo in pixels.
    """
    from cliphar.export import tapped_session  # imported here: a worker must not have torch in its memory

    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    names = sorted({name for node in nodes for name in (*node.input[:2], node.output[0])} - set(constants))
    values = tapped_session(model, names).run(names, {"images": np.zeros((1, size, size, 3), np.uint8)})
    shapes = constants | {name: value.shape for name, value in zip(names, values, strict=True)}
    total = 0.0
    for node in nodes:
        left, right, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
        if node.op_type == "Conv":
            inner = float(np.prod(right[1:]))
        elif node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
            inner = float(left[0])
        else:
            inner = float(left[-1])
        total += 2 * inner * float(np.prod(out))
    return total
