"""Engines that run a bundle's two encoders, behind one small protocol."""

from cliphar.runtime._base import Runtime
from cliphar.runtime._cpu import cpu_quota
from cliphar.runtime._onnx import OnnxRuntime, available_providers

__all__ = ["OnnxRuntime", "Runtime", "available_providers", "cpu_quota"]
