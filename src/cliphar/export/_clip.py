"""CLIP's own towers as graphs, in float32."""

from __future__ import annotations

import onnx
import torch

from cliphar.export._torch_onnx import export
from cliphar.models import OpenClipText

__all__ = ["export_clip_text"]


def export_clip_text(text: OpenClipText, context_length: int) -> onnx.ModelProto:
    """``ids`` int64 [N,context_length] -> ``embeddings`` float32 [N,D], unit length."""
    example = torch.zeros(2, context_length, dtype=torch.int64)
    example[:, 1] = 1  # an end of text for the pooling to find
    return export(text, example, "ids", "embeddings", {0: torch.export.Dim("texts")})
