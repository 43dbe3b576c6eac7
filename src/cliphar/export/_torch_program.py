"""The two files that torch runs without our code, from Python and from C++."""

from __future__ import annotations

import io
import warnings

import onnx
import torch

from cliphar.export._torch_graph import TorchGraph

__all__ = ["torch_program", "torchscript"]


def torch_program(model: onnx.ModelProto) -> bytes:
    """A ``torch.export`` program (.pt2): ``images`` uint8 [N,S,S,3], any N -> float32 [N,D], unit length."""
    graph, example = _graph(model)
    program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("photos")},))
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def torchscript(model: onnx.ModelProto) -> bytes:
    """The same as TorchScript (.pt), traced and frozen."""
    graph, example = _graph(model)
    content = io.BytesIO()
    with warnings.catch_warnings():  # of being superseded by torch.export, and of shapes that are constants
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, (example,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), content)
    return content.getvalue()


def _graph(model: onnx.ModelProto) -> tuple[TorchGraph, torch.Tensor]:
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return TorchGraph(model).eval(), torch.zeros(2, *shape, dtype=torch.uint8)
