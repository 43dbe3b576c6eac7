"""The float32 graph behind a bundle's image.onnx: what every export is made from and measured against.

Weights that are kept in 8 bits are brought back to float, and matrices that round their activations as they run
(dynamic quantisation) become plain ones, so the graph takes any number of photos and no answer depends on a
neighbour.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, reason_of

__all__ = ["float_graph", "fold", "without_room"]

_BATCH = "photos"


def float_graph(bundle: Bundle) -> onnx.ModelProto:
    """``images`` uint8 RGB [N,S,S,3] -> ``embeddings`` float32 [N,D], unit length; float32 throughout, folded.

    Raises:
        BundleError: image.onnx cannot be read, or is quantised in a way that is not known here.
    """
    try:
        model = onnx.load(bundle.file("image.onnx"))
        for value, axes in ((model.graph.input[0], 4), (model.graph.output[0], 2)):
            shape = value.type.tensor_type.shape
            if len(shape.dim) == axes:
                shape.dim[0].Clear()
                shape.dim[0].dim_param = _BATCH
        model = fold(model)  # after that: else shapes are computed for the one photo that it takes
        _undo_dynamic(model)
        return fold(model)
    except BundleError:
        raise
    except Exception as error:  # protobuf's, onnx's and its runtime's own, and KeyError for an unknown pattern
        raise BundleError(
            f"image.onnx of bundle '{bundle.info.name}' cannot be brought back to float: {without_room(error)}"
        ) from error


def without_room(error: Exception) -> str:
    """The error in one line, and the room for temporary files if that is little: engines have no words for it."""
    reason = reason_of(error)
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free / 1e6
    return f"{reason}; {place} has {free:.0f} MB free: set TMPDIR to a folder with more" if free < 1000 else reason


def _undo_dynamic(model: onnx.ModelProto) -> None:
    """x -> DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by (scale * weights' scale) becomes one MatMul."""
    nodes = list(model.graph.node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            constants[node.output[0]] = helper.get_attribute_value(node.attribute[0])
    maker = {name: node for node in nodes for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    replaced: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if node.op_type != "MatMulInteger":
            continue
        quantised = maker[node.input[0]]
        cast = users[node.output[0]][0]
        product = users[cast.output[0]][0]
        scales = maker[next(name for name in product.input if name != cast.output[0])]
        scale = next(constants[name] for name in scales.input if name in constants)
        weights = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
        if len(node.input) > 3 and node.input[3]:
            weights -= numpy_helper.to_array(constants[node.input[3]]).astype(np.float32)
        name = f"{node.input[1]}_float"
        model.graph.initializer.append(numpy_helper.from_array(weights * numpy_helper.to_array(scale), name))
        replaced[product.output[0]] = helper.make_node("MatMul", [quantised.input[0], name], list(product.output))
    kept = [replaced.get(node.output[0], node) for node in nodes]
    wanted = {output.name for output in model.graph.output}
    living: list[onnx.NodeProto] = []
    for node in reversed(kept):
        if wanted & set(node.output):
            living.append(node)
            wanted |= set(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(living))
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants computed, operators of the ONNX standard only, in the newest opset that every target reads.

    Nodes are numbered; tensors that are not computed keep their names.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as work:
        plain, folded = Path(work) / "plain.onnx", Path(work) / "folded.onnx"
        onnx.save(model, plain)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3
        cpu = ["CPUExecutionProvider"]
        onnxruntime.InferenceSession(str(plain), options, cpu, disabled_optimizers=["ConstantSharing"])
        result: onnx.ModelProto = onnx.load(folded)
    versions = {entry.domain: entry.version for entry in result.opset_import}
    del result.opset_import[:]
    result.opset_import.append(helper.make_opsetid("", versions[""]))
    del result.graph.value_info[:]
    for number, node in enumerate(result.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.checker.check_model(result)
    return result
