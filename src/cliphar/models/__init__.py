"""Torch encoders that training uses; serving never imports this."""

from cliphar.models._image_tower import ImageTower
from cliphar.models._minilm import SentenceEncoder, TextProjection
from cliphar.models._open_clip import OpenClipEncoder, import_open_clip, open_clip_encoder

__all__ = [
    "ImageTower",
    "OpenClipEncoder",
    "SentenceEncoder",
    "TextProjection",
    "import_open_clip",
    "open_clip_encoder",
]
