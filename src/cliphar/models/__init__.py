"""Torch encoders that training uses; serving never imports this."""

from cliphar.models._clip_tower import CLIP_DEVIATION, CLIP_MEAN, ClipTower
from cliphar.models._image_tower import ImageTower
from cliphar.models._minilm import SentenceEncoder, TextProjection
from cliphar.models._open_clip import (
    OpenClipEncoder,
    OpenClipImage,
    OpenClipText,
    hub_if_reachable,
    import_open_clip,
    open_clip_encoder,
)
from cliphar.models._towers import WEIGHTS_FILE, Towers, load_towers, open_clip_towers, save_weights

__all__ = [
    "CLIP_DEVIATION",
    "CLIP_MEAN",
    "WEIGHTS_FILE",
    "ClipTower",
    "ImageTower",
    "OpenClipEncoder",
    "OpenClipImage",
    "OpenClipText",
    "SentenceEncoder",
    "TextProjection",
    "Towers",
    "hub_if_reachable",
    "import_open_clip",
    "load_towers",
    "open_clip_encoder",
    "open_clip_towers",
    "save_weights",
]
