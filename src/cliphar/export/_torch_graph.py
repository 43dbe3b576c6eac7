"""The float graph as a torch module, whatever the bundle was made by, and the two files that torch runs of it."""

from __future__ import annotations

import io
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from cliphar.errors import BundleError

__all__ = ["TorchGraph", "torch_program", "torchscript"]

# a tensor, a plain number, or what the graph computes of shapes: whole numbers and lists of them, symbolic to torch
_Value: TypeAlias = Any
_Attributes: TypeAlias = dict[str, Any]


class TorchGraph(nn.Module):
    """``forward`` takes what the graph takes, and answers its one output.

    Args:
        model: a float graph of one input and one output, of operators of the ONNX standard.

    Raises:
        BundleError: an operator that has no torch form here.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        unknown = sorted({node.op_type for node in graph.node} - set(_OPERATORS))
        if unknown:
            raise BundleError(f"the graph has operators without a torch form here: {', '.join(unknown)}")
        self._input, self._output = graph.input[0].name, graph.output[0].name
        self._weights: dict[str, str] = {}
        self._plain: dict[str, _Value] = {"": None}
        for number, tensor in enumerate(graph.initializer):
            value = numpy_helper.to_array(tensor)
            if value.ndim == 0 or (value.ndim == 1 and value.dtype == np.int64):
                self._plain[tensor.name] = value.tolist()
                continue
            name = f"{re.sub(r'[^A-Za-z0-9_]', '_', tensor.name)}_{number}"
            self.register_buffer(name, torch.from_numpy(value.copy()))
            self._weights[tensor.name] = name
        self._nodes = [
            (
                _OPERATORS[node.op_type],
                list(node.input),
                node.output[0],
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in graph.node
        ]

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, _Value] = {self._input: images} | self._plain
        values |= {theirs: getattr(self, ours) for theirs, ours in self._weights.items()}
        for run, names, output, attributes in self._nodes:
            values[output] = run(attributes, *(values[name] for name in names))
        result: Tensor = values[self._output]
        return result


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


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[..., _Value]:
    def run(_: _Attributes, left: _Value, right: _Value) -> _Value:
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            return function(*(torch.tensor(v) if isinstance(v, list) else v for v in (left, right)))
        if isinstance(left, list) or isinstance(right, list):
            pairs = zip(*(v if isinstance(v, list) else [v] for v in (left, right)), strict=True)
            return [function(a, b) for a, b in pairs]
        return function(left, right)

    return run


def _each(function: Callable[[Tensor], Tensor]) -> Callable[..., _Value]:
    return lambda _, x: function(x)


def _clip(_: _Attributes, x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    return x.clamp(low, high)


def _conv(attributes: _Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    return F.conv2d(x, weight, bias, strides, (top, left), dilations, attributes.get("group", 1))


def _gemm(attributes: _Attributes, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    left = left.T if attributes.get("transA") else left
    product: Tensor = attributes.get("alpha", 1.0) * F.linear(left, right if attributes.get("transB") else right.T)
    return product if bias is None else torch.add(product, bias, alpha=attributes.get("beta", 1.0))


def _layer_norm(attributes: _Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, attributes.get("epsilon", 1e-5))


def _batch_norm(
    attributes: _Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, eps=attributes.get("epsilon", 1e-5))


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(attributes: _Attributes, x: Tensor, axes: list[int] | None = None) -> Tensor:
        return function(x, dim=axes or attributes["axes"], keepdim=bool(attributes.get("keepdims", 1)))

    return run


def _softmax(attributes: _Attributes, x: Tensor) -> Tensor:
    return x.softmax(attributes.get("axis", -1))


def _gelu(attributes: _Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attributes.get("approximate", b"none").decode())


def _normalize(attributes: _Attributes, x: Tensor) -> Tensor:
    return F.normalize(x, attributes.get("p", 2), attributes.get("axis", -1))


def _reshape(_: _Attributes, x: _Value, shape: list[_Value]) -> _Value:
    if not isinstance(x, Tensor):
        return x if isinstance(x, list) else [x]
    # torch.export must not ask whether a symbolic size is nought
    return x.reshape([x.shape[i] if isinstance(size, int) and size == 0 else size for i, size in enumerate(shape)])


def _squeeze(attributes: _Attributes, x: _Value, axes: list[int] | None = None) -> _Value:
    if not isinstance(x, Tensor):
        return x[0]
    return x.squeeze(axes or attributes["axes"])


def _unsqueeze(attributes: _Attributes, x: _Value, axes: list[int] | None = None) -> _Value:
    if not isinstance(x, Tensor) or x.dim() == 0:  # a size, which TorchScript's tracing makes a tensor
        return [x]
    for axis in sorted(axes or attributes["axes"]):
        x = x.unsqueeze(axis)
    return x


def _concat(attributes: _Attributes, *values: _Value) -> _Value:
    if isinstance(values[0], list):
        return [size for value in values for size in value]
    return torch.cat(values, attributes["axis"])


def _slice(attributes: _Attributes, x: _Value, *given: list[int]) -> _Value:
    named = dict(zip(("starts", "ends", "axes", "steps"), given, strict=False)) or attributes
    starts, ends = named["starts"], named["ends"]
    axes, steps = named.get("axes") or range(len(starts)), named.get("steps") or [1] * len(starts)
    whole = [slice(None)] * (1 if isinstance(x, list) else x.dim())
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        whole[axis] = slice(start, end, step)
    return x[whole[0]] if isinstance(x, list) else x[tuple(whole)]


def _gather(attributes: _Attributes, x: _Value, index: _Value) -> _Value:
    axis = attributes.get("axis", 0)
    if isinstance(x, list):
        return [x[i] for i in index] if isinstance(index, list) else x[index]
    if isinstance(index, int):
        return x.select(axis, index)
    index = index if isinstance(index, Tensor) else torch.tensor(index)
    return x.index_select(axis, index.flatten()).unflatten(axis, index.shape)


def _shape(attributes: _Attributes, x: Tensor) -> list[_Value]:
    return list(x.shape)[attributes.get("start", 0) : attributes.get("end")]


def _expand(_: _Attributes, x: Tensor, shape: list[_Value]) -> Tensor:
    kept = len(shape) - x.dim()
    return x.expand([-1 if i >= kept and isinstance(n, int) and n == 1 else n for i, n in enumerate(shape)])


def _cast(attributes: _Attributes, x: _Value) -> _Value:
    dtype = helper.tensor_dtype_to_np_dtype(attributes["to"])
    return x.to(torch.from_numpy(np.zeros(0, dtype)).dtype) if isinstance(x, Tensor) else x


def _where(_: _Attributes, condition: _Value, yes: _Value, no: _Value) -> _Value:
    if isinstance(condition, list):
        return [a if c else b for c, a, b in zip(condition, yes, no, strict=True)]
    return torch.where(condition, yes, no)


_OPERATORS: dict[str, Callable[..., _Value]] = {
    "Add": _elementwise(operator.add),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _elementwise(lambda a, b: a / b if isinstance(a, Tensor) or isinstance(b, Tensor) else a // b),
    "Equal": _elementwise(operator.eq),
    "Erf": _each(torch.erf),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _normalize,
    "MatMul": _elementwise(operator.matmul),
    "Mul": _elementwise(operator.mul),
    "Pow": _elementwise(operator.pow),
    "Range": lambda _, start, end, step: torch.arange(start, end, step),
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMean": _reduce(torch.mean),
    "Relu": _each(torch.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _each(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": _each(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(operator.sub),
    "Transpose": lambda attributes, x: x.permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
