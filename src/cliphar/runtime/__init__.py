"""Engines that run a bundle's two encoders, behind one small protocol."""

from cliphar.runtime._base import Runtime, cpu_quota
from cliphar.runtime._choose import RuntimeChoice, choose_runtime, images_per_s, load_runtime
from cliphar.runtime._onnx import OnnxRuntime, available_providers
from cliphar.runtime._openvino import OpenVinoRuntime, import_openvino
from cliphar.runtime._tensorrt import TensorRtRuntime, import_tensorrt
from cliphar.runtime._torch import TorchRuntime

__all__ = [
    "OnnxRuntime",
    "OpenVinoRuntime",
    "Runtime",
    "RuntimeChoice",
    "TensorRtRuntime",
    "TorchRuntime",
    "available_providers",
    "choose_runtime",
    "cpu_quota",
    "images_per_s",
    "import_openvino",
    "import_tensorrt",
    "load_runtime",
]
