"""The image tower as a graph that takes pixels, with its weights kept in 8 bits."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn

from cliphar.export._quantize import correct_biases, round_weights, weight_axes
from cliphar.export._torch_onnx import export

__all__ = ["borrow_weights", "compress_weights", "export_image_tower", "shorten_names"]

_FEW = 1000  # weights of a layer that stay float: of the first layers, whose rounding would be in all that follows
_WORTH_BORROWING = 256


class _FromPixels(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(images.permute(0, 3, 1, 2).float())
        return embeddings


def export_image_tower(tower: nn.Module, size: int) -> onnx.ModelProto:
    """``images`` uint8 RGB [N,size,size,3] -> ``embeddings`` float32 [N,D], unit length; batch norms folded.

    ``tower`` takes float [N,3,size,size] with values in 0..255, as :class:`ImageTower` and open_clip's encoders do.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    model = export(_FromPixels(tower), example, "images", "embeddings", {0: torch.export.Dim("photos")})
    with tempfile.TemporaryDirectory() as work:
        plain, folded = Path(work) / "plain.onnx", Path(work) / "folded.onnx"
        onnx.save(model, plain)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        result: onnx.ModelProto = onnx.load(folded)
    del result.graph.value_info[:]
    return result


def compress_weights(model: onnx.ModelProto, photos: NDArray[np.uint8]) -> onnx.ModelProto:
    """Keep the weights of convolutions and matrices as int8 with a scale for each output channel.

    They are brought back to float by plain Cast and Mul nodes that every runtime folds while loading: a quarter of
    the size, and no loss of speed. Biases are corrected over ``photos``, uint8 [N,S,S,3]: in an EfficientNet-Lite
    that, and the first layers left alone, is three quarters of the error.
    """
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    axes = {name: axis for name, axis in weight_axes(model).items() if sizes.get(name, 0) >= _FEW}
    few = [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] not in axes]
    compressed = correct_biases(model, photos, few)
    nodes, kept = [], []
    for tensor in compressed.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if tensor.name not in axes or weights.dtype != np.float32:
            kept.append(tensor)
            continue
        whole, scale = round_weights(weights, axes[tensor.name])
        name = tensor.name
        kept += [
            numpy_helper.from_array(whole.astype(np.int8), f"{name}_int8"),
            numpy_helper.from_array(scale, f"{name}_scale"),
        ]
        nodes += [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_cast"], to=TensorProto.FLOAT, name=f"{name}_cast"),
            helper.make_node("Mul", [f"{name}_cast", f"{name}_scale"], [name], name=f"{name}_scaled"),
        ]
    nodes += compressed.graph.node
    del compressed.graph.initializer[:], compressed.graph.node[:]
    compressed.graph.initializer.extend(kept)
    compressed.graph.node.extend(nodes)
    shorten_names(compressed, weights=False)  # by which load_towers finds them
    onnx.checker.check_model(compressed)
    return compressed


def borrow_weights(model: onnx.ModelProto, name: str, lender: bytes) -> onnx.ModelProto:
    """The same graph without the weights that another file in its folder, ``name``, holds byte for byte.

    They become ONNX external data at their offsets in ``lender``, that file's content, which is mapped rather than
    read: of a bundle whose weights are in 8 bits already, an 8-bit graph is little more than its ranges.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if not tensor.HasField("raw_data"):  # as quantising writes scales
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        size = len(tensor.raw_data)
        at = lender.find(tensor.raw_data) if size >= _WORTH_BORROWING else -1
        if at >= 0:
            set_external_data(tensor, name, offset=at, length=size)
            tensor.ClearField("raw_data")
    shorten_names(result)
    return result


def shorten_names(model: onnx.ModelProto, *, weights: bool = True) -> None:
    """Number the values, and the ``weights`` too, instead of naming each by its path, in place: of a graph without
    weights most are names."""
    graph = model.graph
    del graph.value_info[:]
    kept = [*graph.input, *graph.output, *([] if weights else graph.initializer)]
    short = {"": ""} | {value.name: value.name for value in kept}
    for tensor in graph.initializer:
        tensor.name = short.setdefault(tensor.name, f"w{len(short)}")
    for node in graph.node:
        node.name = ""
        node.input[:] = [short[name] for name in node.input]
        node.output[:] = [short.setdefault(name, f"v{len(short)}") for name in node.output]
