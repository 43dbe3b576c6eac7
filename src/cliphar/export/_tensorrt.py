"""A TensorRT engine, built from the same ONNX graph on the GPU that will run it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from cliphar.bundle import write_whole
from cliphar.errors import BundleError, UsageError
from cliphar.runtime import TensorRtRuntime, import_tensorrt

__all__ = ["build_engine", "float_first"]


def build_engine(model: onnx.ModelProto, cache: Path) -> bytes:
    """A serialised engine for batches of 1 to 64, best at 8.

    Precision is the graph's own: TensorRT 10 takes half precision from a float16 graph, and 8 bits from quantise and
    dequantise nodes with their calibrated scales and no zero points.

    Args:
        model: ``images`` uint8 [N,S,S,3] -> ``embeddings``.
        cache: the file of timings, read if it is there and of this GPU and TensorRT, and written anew if it may be.

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
    if not parser.parse(float_first(model).SerializeToString()):
        raise BundleError(f"TensorRT cannot read the graph: {parser.get_error(0).desc()}")
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((batch, *shape) for batch in (1, 8, TensorRtRuntime.max_batch)))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    known = b""
    with suppress(OSError):
        known = cache.read_bytes()
    timings = config.create_timing_cache(known)
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):  # damaged, or of others
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BundleError("TensorRT cannot build an engine of the graph; see its messages above")
    with suppress(OSError):  # the next build takes longer, and that is all
        write_whole(cache, bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def float_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its pixels cast before all else: of TensorRT's layers only that one takes uint8."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, pixels = result.graph, model.graph.input[0].name
    for node in graph.node:
        node.input[:] = [f"{pixels}_float" if name == pixels else name for name in node.input]
    nodes = [helper.make_node("Cast", [pixels], [f"{pixels}_float"], to=TensorProto.FLOAT), *graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return result
