"""Make the graphs that serving runs."""

from cliphar.export._image import compress_weights, export_image_tower
from cliphar.export._teacher import export_teacher_graph
from cliphar.export._text import export_text_tower, quantize_sentence_encoder

__all__ = [
    "compress_weights",
    "export_image_tower",
    "export_teacher_graph",
    "export_text_tower",
    "quantize_sentence_encoder",
]
