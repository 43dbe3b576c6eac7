"""Make the graphs that serving runs, and prove them."""

from cliphar.export._export import Added, export_bundle
from cliphar.export._float import float_graph
from cliphar.export._image import compress_weights, export_image_tower
from cliphar.export._layouts import LAYOUTS, write_layout
from cliphar.export._open_clip import export_clip_text, open_clip_bundle, open_clip_name, pull_open_clip
from cliphar.export._photos import Proof, read_proof
from cliphar.export._quantize import tapped_session
from cliphar.export._targets import TARGETS
from cliphar.export._teacher import TEACHER_SIZE, export_teacher_graph, teacher_tensors
from cliphar.export._text import export_text_tower, quantize_sentence_encoder

__all__ = [
    "LAYOUTS",
    "TARGETS",
    "TEACHER_SIZE",
    "Added",
    "Proof",
    "compress_weights",
    "export_bundle",
    "export_clip_text",
    "export_image_tower",
    "export_teacher_graph",
    "export_text_tower",
    "float_graph",
    "open_clip_bundle",
    "open_clip_name",
    "pull_open_clip",
    "quantize_sentence_encoder",
    "read_proof",
    "tapped_session",
    "teacher_tensors",
    "write_layout",
]
