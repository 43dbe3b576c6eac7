"""The text tower as one graph of 4-bit weights: sentence encoder, then projection."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import compose, numpy_helper

from cliphar.export._image import shorten_names
from cliphar.export._quantize import drop_unused
from cliphar.export._torch_onnx import export
from cliphar.models import SentenceEncoder, TextProjection

__all__ = ["export_text_tower", "quantize_sentence_encoder"]


def _weight_only(
    model: onnx.ModelProto, bits: int, block: int, operators: tuple[str, ...], left_out: Sequence[str] = ()
) -> onnx.ModelProto:
    handlers, level = list(logging.root.handlers), logging.root.level
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.root.handlers[:] = handlers  # the import sets both, and every library's notes would be in the output
    logging.root.setLevel(level)
    config = DefaultWeightOnlyQuantConfig(
        block_size=block,
        is_symmetric=True,
        accuracy_level=4,
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=operators,
        quant_axes=(("MatMul", 0), ("Gather", 1)),
        bits=bits,
    )
    quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=list(left_out), algo_config=config)
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _gemm_to_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write each Gemm by a constant as MatMul and Add, the form that the weight-only quantizer takes."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Gemm" or node.input[1] not in constants:
            nodes.append(node)
            continue
        weight = constants[node.input[1]]
        if attributes.get("transB"):
            transposed = numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name + "_transposed")
            if transposed.name not in constants:
                constants[transposed.name] = transposed
                model.graph.initializer.append(transposed)
            weight = transposed
        product = node.output[0] + "_product"
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], weight.name], [product], name=node.name + "_mm"))
        nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], list(node.output), name=node.name + "_add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return drop_unused(model)


def _halve_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep the blocks' scales in half precision: one for every few dozen 4-bit weights, they are much of the file.

    Runtimes bring them back to float32, which the arithmetic is in, while they load.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = [node.input[2] for node in model.graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    for name in dict.fromkeys(scales):
        half = numpy_helper.to_array(tensors[name]).astype(np.float16)
        tensors[name].CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        cast = onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT, name=f"{name}_cast")
        model.graph.node.insert(0, cast)
    return model


def quantize_sentence_encoder(encoder: SentenceEncoder, block: int) -> onnx.ModelProto:
    """``ids`` int64 [N,T] -> ``sentences`` float32 [N,384], with 4-bit matrices and embeddings in blocks.

    The projection is trained on what this graph answers, so it makes up for the rounding.
    """
    dynamic = {0: torch.export.Dim("photos"), 1: torch.export.Dim("tokens", max=64)}
    example = torch.randint(1, 100, (3, 9))
    model = _gemm_to_matmul(export(encoder, example, "ids", "sentences", dynamic))
    return _weight_only(model, 4, block, ("MatMul", "Gather"))


def export_text_tower(sentences: onnx.ModelProto, projection: TextProjection, block: int) -> onnx.ModelProto:
    """``ids`` int64 [N,T] -> ``embeddings`` float32 [N,D], unit length.

    Of the projection, the perceptron's weights are kept in 4 bits (cosine 0.9998 to 8 bits on labels and captions) and
    the linear map's, which carries most of the answer, in 8 (4 bits: 0.998).
    """
    example = torch.zeros(3, SentenceEncoder.out_features)
    tail = _gemm_to_matmul(export(projection, example, "projected", "embeddings", {0: torch.export.Dim("photos")}))
    products = {node.input[1]: node.name for node in tail.graph.node if node.op_type == "MatMul"}
    linear = next(name for weight, name in products.items() if weight.startswith("linear."))
    tail = _weight_only(tail, 4, block, ("MatMul",), left_out=[linear])
    tail = _weight_only(tail, 8, block, ("MatMul",))
    tail.ir_version = sentences.ir_version
    domains = {entry.domain: entry.version for entry in [*sentences.opset_import, *tail.opset_import]}
    for model in (sentences, tail):
        del model.opset_import[:]
        model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in domains.items())
    merged: onnx.ModelProto = compose.merge_models(
        compose.add_prefix(sentences, "encoder/", rename_inputs=False, rename_outputs=False),
        compose.add_prefix(tail, "projection/", rename_inputs=False, rename_outputs=False),
        io_map=[("sentences", "projected")],
    )
    result = _halve_scales(merged)
    shorten_names(result)
    return result
