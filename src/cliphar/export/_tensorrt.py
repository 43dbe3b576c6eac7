"""A TensorRT engine, built from the same ONNX graph on the GPU that will run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cliphar.errors import BundleError, UsageError
from cliphar.runtime import TensorRtRuntime, import_tensorrt

if TYPE_CHECKING:
    import onnx

__all__ = ["build_engine"]


def build_engine(model: onnx.ModelProto, cache: Path) -> bytes:
    """A serialised engine for batches of 1 to 64, best at 8.

    Precision is the graph's own: TensorRT 10 takes half precision from a float16 graph, and 8 bits from quantise and
    dequantise nodes with their calibrated scales.

    Args:
        model: ``images`` uint8 [N,S,S,3] -> ``embeddings``.
        cache: the file of timings, read if it is there and written anew.

    Raises:
        UsageError: TensorRT or a GPU is missing.
        BundleError: TensorRT cannot build the graph.
    """
    trt, cuda = import_tensorrt()
    status, count = cuda.cudaGetDeviceCount()
    if status.value or not count:
        raise UsageError("a TensorRT engine is built on a machine with a GPU, and there is none here")
    logger: Any = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise BundleError(f"TensorRT cannot read the graph: {parser.get_error(0).desc()}")
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((batch, *shape) for batch in (1, 8, TensorRtRuntime.max_batch)))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BundleError("TensorRT cannot build an engine of the graph; see its messages above")
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return np.asarray(engine).tobytes()
