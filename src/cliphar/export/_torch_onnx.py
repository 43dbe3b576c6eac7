"""torch.onnx.export, quietly."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn

__all__ = ["OPSET", "export"]

OPSET = 21  # the first with blocked, 4-bit DequantizeLinear


def export(
    module: nn.Module, example: Tensor, input_name: str, output_name: str, dynamic: dict[int, Any]
) -> onnx.ModelProto:
    """Export a module of one input and one output; ``dynamic`` maps the input's free axes to their names."""
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (example,),
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=(dynamic,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the exporting machine
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    onnx.checker.check_model(model)
    return model
