"""The image tower as a graph that takes pixels, in float32 and in static int8."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cliphar.export._torch_onnx import export
from cliphar.models import ImageTower

__all__ = ["export_image_tower", "quantize_image_graph"]


class _FromPixels(nn.Module):
    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(images.permute(0, 3, 1, 2).float())
        return embeddings


def export_image_tower(tower: ImageTower, size: int) -> onnx.ModelProto:
    """``images`` uint8 RGB [N,size,size,3] -> ``embeddings`` float32 [N,D], unit length."""
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    return export(_FromPixels(tower), example, "images", "embeddings", {0: torch.export.Dim("photos")})


def quantize_image_graph(model: onnx.ModelProto, photos: NDArray[np.uint8], batch_size: int = 16) -> onnx.ModelProto:
    """Static int8: convolutions and the projection, weights per channel, activations by the range over ``photos``.

    Args:
        model: what :func:`export_image_tower` made.
        photos: uint8 [N,S,S,3]; a few hundred that look like those to come.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[NDArray[np.uint8]] = (
                photos[start : start + batch_size] for start in range(0, len(photos), batch_size)
            )

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as work:
        plain, folded, quantized = (Path(work) / f"{name}.onnx" for name in ("plain", "folded", "quantized"))
        onnx.save(model, plain)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        result: onnx.ModelProto = onnx.load(quantized)
    del result.graph.value_info[:]
    return result
