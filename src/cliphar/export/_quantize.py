"""Static 8-bit graphs: quantise and dequantise nodes that both ONNX Runtime and OpenVINO turn into int8 arithmetic."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "bias_shifts",
    "correct_biases",
    "drop_unused",
    "quantize",
    "quantize_within",
    "round_weights",
    "sensitivity",
    "tapped_session",
    "weight_axes",
]

# Clip and Relu with the convolution before them: what is quantised is then what is left of its range
_OPERATORS = ["Conv", "MatMul", "Gemm", "Clip", "Relu"]
_WEIGHED = ("Conv", "MatMul", "Gemm")
_WEAK = 1e-4


def weight_axes(model: onnx.ModelProto) -> dict[str, int]:
    """Of each constant that weighs inputs, the axis of its output channels."""
    axes = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            axes[node.input[1]] = 0
        elif node.op_type in ("Gemm", "MatMul"):
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axes[node.input[1]] = 0 if transposed else 1
    return axes


def round_weights(weights: NDArray[np.float32], axis: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whole numbers in -127..127, float32 of the same shape, and their scale for each channel along ``axis``."""
    scale = np.abs(weights).max(tuple(a for a in range(weights.ndim) if a != axis), keepdims=True) / 127
    scale[scale <= _WEAK * scale.max()] = 1  # zeros, for a scale that small leaves a bias no room in 32 bits
    return np.round(weights / scale), scale


def correct_biases(
    model: onnx.ModelProto,
    photos: NDArray[np.uint8],
    float_nodes: Collection[str] = (),
    shifts: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """The graph with biases that make up for what rounding its weights to 8 bits adds on average.

    Of each convolution but ``float_nodes``, which will not be rounded, over ``photos``, uint8 [N,S,S,3] (Nagel et al.,
    2019, https://arxiv.org/abs/1906.04721). ``shifts`` is what :func:`bias_shifts` found of the two, if that is known.
    """
    if shifts is None:
        shifts = bias_shifts(model, photos)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    biases = {tensor.name: tensor for tensor in result.graph.initializer}
    for node in model.graph.node:
        if node.name in shifts and node.name not in float_nodes:
            bias = biases[node.input[2]]
            bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + shifts[node.name], bias.name))
    return result


def bias_shifts(model: onnx.ModelProto, photos: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """What rounding each convolution's weights takes off its outputs on average, float32 [O]; 0 if they are rounded."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and len(node.input) == 3 and {*node.input[1:]} <= constants.keys()
    ]
    means = _mean_inputs(model, sorted({node.input[0] for node in layers}), photos) if layers else {}
    shifts = {}
    for node in layers:
        weights = numpy_helper.to_array(constants[node.input[1]])
        whole, scale = round_weights(weights, 0)
        lost = weights - whole * scale
        lost[np.abs(lost) < 1e-4 * scale] = 0
        lost = lost.sum(tuple(range(2, lost.ndim)))  # [O,I/G] of G groups
        mean = means[node.input[0]].reshape(-1, 1, lost.shape[1])
        shifts[node.name] = (lost.reshape(len(mean), -1, lost.shape[1]) * mean).sum(-1).reshape(-1)
    return shifts


def _mean_inputs(model: onnx.ModelProto, names: list[str], photos: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """The mean over ``photos`` and places, float32 [C], of values [N,C,...] within the graph."""
    wanted = [f"{name}_mean" for name in names]
    pools = [helper.make_node("GlobalAveragePool", [name], [mean]) for name, mean in zip(names, wanted, strict=True)]
    session = tapped_session(model, wanted, pools)
    sums: dict[str, NDArray[np.float32]] = {name: np.zeros(1, np.float32) for name in names}
    for at in range(0, len(photos), 8):
        for name, found in zip(names, session.run(wanted, {"images": photos[at : at + 8]}), strict=True):
            sums[name] = sums[name] + found.reshape(*found.shape[:2], -1).mean(2).sum(0)
    return {name: (total / len(photos)).astype(np.float32) for name, total in sums.items()}


def tapped_session(
    model: onnx.ModelProto, names: Sequence[str], nodes: Sequence[onnx.NodeProto] = ()
) -> onnxruntime.InferenceSession:
    """A session on the CPU of the graph with ``nodes`` added, which also answers the values ``names`` within it."""
    import onnxruntime

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.node.extend(nodes)
    answered = {output.name for output in model.graph.output}
    tapped.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in answered)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(tapped.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Reader:
    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._batches = iter([{"images": images[at : at + 4]} for at in range(0, len(images), 4)])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._batches, None)


def quantize(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    float_nodes: Sequence[str] = (),
    *,
    symmetric: bool = False,
    shifts: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """Weights in int8 for each channel, biases corrected, activations in uint8 by their range over ``images``.

    ``symmetric`` activations are int8 around zero, without zero points: TensorRT takes no others. ``shifts``: see
    :func:`correct_biases`.

    Of matrix products only those by constant weights; their outputs stay float, since what follows (residuals,
    normalisation, attention) is not quantised. The first convolution stays float: it costs little time, and its
    rounding would be in all that follows.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    stem = next((node.name for node in model.graph.node if node.op_type == "Conv"), None)
    kept = [*float_nodes, *([stem] if stem else [])]
    noisy = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        source, target = Path(work) / "float.onnx", Path(work) / "int8.onnx"
        onnx.save(correct_biases(model, images, kept, shifts), source)
        try:
            logging.disable(logging.WARNING)
            quantize_static(
                source,
                target,
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_OPERATORS,
                nodes_to_exclude=kept,
                per_channel=True,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": symmetric,
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                    "QuantizeBias": False,  # runtimes do it, and as floats image.onnx can lend them
                },
            )
        finally:
            logging.disable(noisy)
        result: onnx.ModelProto = onnx.load(target)
    return _without_zero_points(result)


def _without_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """Leave out the zero points of weights and biases, one a channel: all are 0, which is what none means."""
    zero = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in (TensorProto.INT8, TensorProto.INT32) and not numpy_helper.to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[2] in zero:
            del node.input[2]
    return drop_unused(model)


def drop_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove constants that no node takes, in place."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def quantize_within(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    loss: Callable[[onnx.ModelProto], str | None],
    *,
    symmetric: bool = False,
) -> tuple[onnx.ModelProto, list[str]]:
    """Quantise, keeping the most sensitive layers in float: 0, 1, 2, 4, ... of them, until ``loss`` finds none.

    Args:
        model: the float32 graph.
        images: uint8 [N,S,S,3], for the ranges.
        loss: given a quantised graph, what is wrong with it, or None.
        symmetric: see :func:`quantize`.

    Returns:
        The graph (the last tried if none was good), and the names of the layers in float.
    """
    shifts = bias_shifts(model, images)  # once for all tries
    quantised = quantize(model, images, symmetric=symmetric, shifts=shifts)
    if loss(quantised) is None:
        return quantised, []
    ranked = sensitivity(model, images[:4])
    kept = 1
    while kept <= len(ranked) // 2:
        quantised = quantize(model, images, ranked[:kept], symmetric=symmetric, shifts=shifts)
        if loss(quantised) is None:
            break
        kept *= 2
    return quantised, ranked[:kept]


def sensitivity(model: onnx.ModelProto, images: NDArray[np.uint8]) -> list[str]:
    """Layers with constant weights, worst first: the relative error of each one's output from rounding its input."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in _WEIGHED and node.input[1] in constants]
    names = sorted({node.input[0] for node in layers})
    inputs = dict(zip(names, tapped_session(model, names).run(names, {"images": images}), strict=True))
    errors = {}
    for node in layers:
        x = inputs[node.input[0]]
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 1e-6)
        scale = (high - low) / 255
        zero = round(-low / scale)
        rounded = ((np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)
        exact, off = _run_node(node, constants, (x, rounded))
        errors[node.name] = float(np.linalg.norm(off - exact) / (np.linalg.norm(exact) + 1e-12))
    return sorted(errors, key=lambda name: -errors[name])


def _run_node(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], values: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """What one layer makes of each of ``values``, which are of one shape."""
    if node.op_type == "MatMul":
        weights = numpy_helper.to_array(constants[node.input[1]])
        return [value @ weights for value in values]
    import onnxruntime

    graph = helper.make_graph(
        [node],
        "one layer",
        [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, values[0].shape)],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        [constants[name] for name in node.input[1:] if name],
    )
    single = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(single.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, {node.input[0]: value})[0] for value in values]
