"""Torch encoders that training uses; serving never imports this."""

from cliphar.models._image_tower import ImageTower
from cliphar.models._minilm import SentenceEncoder, TextProjection

__all__ = ["ImageTower", "SentenceEncoder", "TextProjection"]
