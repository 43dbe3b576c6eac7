"""What can be made of a bundle's float graph, one function a target."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from cliphar.bundle import store
from cliphar.errors import ClipharError
from cliphar.export._image import borrow_weights, compress_weights
from cliphar.export._quantize import quantize_within
from cliphar.export._smooth import smooth_inputs
from cliphar.export._tensorrt import build_engine
from cliphar.export._torch_graph import torch_program, torchscript
from cliphar.runtime import import_openvino

__all__ = ["TARGETS", "Material", "Target"]

Files = dict[str, bytes]


@dataclass(frozen=True)
class Material:
    """What a target is made from: ``shipped`` is the bundle's image.onnx and ``model`` the float32 graph behind it.

    ``calibration`` is uint8 [N,S,S,3], for the ranges of 8-bit graphs. ``judge`` says what is wrong with an 8-bit
    graph, or None. ``work`` is a folder for temporary files, ``say`` is told what is going on, and ``quantized`` keeps
    the 8-bit graphs that several targets are made from, by whether they are symmetric.
    """

    shipped: Path
    model: onnx.ModelProto
    calibration: NDArray[np.uint8]
    judge: Callable[[onnx.ModelProto], str | None]
    work: Path
    say: Callable[[str], None]
    quantized: dict[bool, onnx.ModelProto] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A runtime to add: its precision, a key of ``TOLERANCES``, and what makes its files; the first is loaded."""

    precision: str
    build: Callable[[Material], Files]


def _onnx_fp32(material: Material) -> Files:
    return {"image.fp32.onnx": material.model.SerializeToString()}


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # pixels are scaled, and lengths taken, in float32: 255 squared is above what half precision holds
    blocked = ["ReduceL2", "LpNormalization", "Pow", "ReduceMean", "Softmax", "LayerNormalization"]
    # without the types of what is between nodes, those that stay in float32 would be given half precision
    half: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, op_block_list=blocked)
    OnnxModel.graph_topological_sort(half.graph)  # casts were put at the end
    del half.graph.value_info[:]
    return half


def _onnx_fp16(material: Material) -> Files:
    graph = material.work / "half.onnx"
    graph.write_bytes(_half(material.model).SerializeToString())
    load = "import sys, onnxruntime as o; o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    done = subprocess.run([sys.executable, "-c", load, str(graph)], capture_output=True, check=False)
    if done.returncode < 0:  # ONNX Runtime 1.32 does so with open_clip's ViT, and would take us with it
        raise ClipharError(
            f"onnx-fp16 cannot be made: this ONNX Runtime crashes as it loads the graph (signal {-done.returncode}); "
            "choose openvino-bf16, or tensorrt on a GPU"
        )
    return {"image.fp16.onnx": graph.read_bytes()}


def _onnx_w8(material: Material) -> Files:
    return {"image.w8.onnx": compress_weights(material.model, material.calibration).SerializeToString()}


def _quantized(material: Material, *, symmetric: bool = False) -> onnx.ModelProto:
    """The 8-bit graph, made once for all targets that are made from it."""
    if symmetric not in material.quantized:
        smooth = smooth_inputs(material.model, material.calibration)
        model, kept = quantize_within(smooth, material.calibration, material.judge, symmetric=symmetric)
        if kept:
            material.say(f"{len(kept)} sensitive layers stay in float: {', '.join(kept[:8])}")
        material.quantized[symmetric] = model
    return material.quantized[symmetric]


def _onnx_int8(material: Material) -> Files:
    graph = borrow_weights(_quantized(material), material.shipped.name, material.shipped.read_bytes())
    return {"image.int8.onnx": graph.SerializeToString()}


def _openvino(model: onnx.ModelProto, name: str, work: Path, *, half: bool = False) -> Files:
    openvino = import_openvino()
    source, target = work / f"{name}.onnx", work / f"{name}.xml"
    onnx.save(model, source)
    openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=half)
    return {
        f"openvino/{name}.xml": target.read_bytes(),
        f"openvino/{name}.bin": target.with_suffix(".bin").read_bytes(),
    }


def _tensorrt(model: onnx.ModelProto, name: str) -> Files:
    return {f"image.{name}.plan": build_engine(model, store() / "tensorrt.timings")}


TARGETS: dict[str, Target] = {
    "onnx-fp32": Target("fp32", _onnx_fp32),
    "onnx-fp16": Target("fp16", _onnx_fp16),
    "onnx-w8": Target("w8", _onnx_w8),
    "onnx-int8": Target("int8", _onnx_int8),
    "openvino": Target("fp32", lambda m: _openvino(m.model, "fp32", m.work)),
    "openvino-bf16": Target("bf16", lambda m: _openvino(m.model, "bf16", m.work, half=True)),
    "openvino-int8": Target("int8", lambda m: _openvino(_quantized(m), "int8", m.work)),
    "torch-export": Target("fp32", lambda m: {"image.pt2": torch_program(m.model)}),
    "torchscript": Target("fp32", lambda m: {"image.pt": torchscript(m.model)}),
    "tensorrt": Target("fp16", lambda m: _tensorrt(_half(m.model), "fp16")),
    "tensorrt-int8": Target("int8", lambda m: _tensorrt(_quantized(m, symmetric=True), "int8")),
}
