"""mini's image tower: an EfficientNet-Lite backbone and a linear projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliphar.models._efficientnet import EfficientNetLite

__all__ = ["ImageTower"]


class ImageTower(nn.Module):
    """uint8-valued pixels to unit-length embeddings.

    ``forward`` takes float [N,3,H,W] with values in 0..255 (any H and W that the backbone's strides allow) and
    returns float [N, out_features].
    """

    def __init__(self, backbone: str, out_features: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.backbone = EfficientNetLite(backbone, drop_path)
        self.project = nn.Linear(self.backbone.out_features, out_features)
        self.out_features = out_features
        self._frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the backbone sees at each place: float [N,1280,H/32,W/32], rounded up."""
        return self.backbone(images / 127.5 - 1.0)  # type: ignore[no-any-return]

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings, float [N, out_features], unit length, of ``features``."""
        return F.normalize(self.project(features.mean((2, 3))), dim=-1)

    def freeze_stem(self, blocks: int) -> None:
        """Keep the stem and the first ``blocks`` blocks as they are: no gradients, fixed batch statistics."""
        self._frozen = self.backbone.first(blocks)
        for module in self._frozen:
            module.requires_grad_(False)

    def train_unfrozen(self) -> None:
        """Training mode for all but the frozen modules."""
        self.train()
        for module in self._frozen:
            module.eval()

    def load_backbone(self, weights: dict[str, torch.Tensor]) -> None:
        """Load ImageNet weights, leaving out their classifier; ValueError if anything else is missing or left."""
        result = self.backbone.load_state_dict(weights, strict=False)
        left = [key for key in result.unexpected_keys if not key.startswith("_fc.")]
        if result.missing_keys or left:
            raise ValueError(f"weights do not fit: missing {result.missing_keys[:3]}, left over {left[:3]}")
