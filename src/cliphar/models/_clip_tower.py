"""CLIP's image tower in torch, whose last layers can be scaled and shifted while its matrices stay as they are.

After Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022,
https://arxiv.org/abs/2210.08823: a factor and a term for each output of a matrix, and those of the norms.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["CLIP_DEVIATION", "CLIP_MEAN", "ClipTower"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64  # of every CLIP


class ClipTower(nn.Module):
    """CLIP's ViT in bfloat16, its parameters named as transformers' CLIPVisionModelWithProjection names them.

    ``tensors`` are float32, ``encoder.layers.0.mlp.fc1.weight`` [out,in] and the like. What is trained are the norms,
    biases and ``scale`` (float32 [out], 1 at first) of the last ``tuned`` layers and of the norm after them.
    """

    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], tuned: int) -> None:
        super().__init__()
        count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
        if not 1 <= tuned < count:
            raise ValueError(f"{tuned} of {count} layers cannot be tuned")
        self.first = count - tuned
        self.patches = nn.Buffer(_tensor(tensors, "embeddings.patch_embedding.weight"), persistent=False)
        self.start = nn.Buffer(_tensor(tensors, "embeddings.class_embedding"), persistent=False)
        self.positions = nn.Buffer(_tensor(tensors, "embeddings.position_embedding.weight"), persistent=False)
        self.pre_layrnorm = _Norm(tensors, "pre_layrnorm")
        self.layers = nn.ModuleList(_Layer(tensors, f"encoder.layers.{number}") for number in range(count))
        self.post_layernorm = _Norm(tensors, "post_layernorm")
        self.projection = nn.Buffer(_tensor(tensors, "visual_projection.weight"), persistent=False)
        for part in (self.pre_layrnorm, *self.layers[: self.first]):
            part.requires_grad_(False)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """What the layers that stay as they are make of uint8 RGB [N,S,S,3]: bfloat16 [N,1+patches,W]."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_DEVIATION))
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / deviation
        patches = F.conv2d(pixels, self.patches, stride=self.patches.shape[-1]).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(len(images), 1, -1), patches], 1) + self.positions
        tokens = self.pre_layrnorm(tokens).bfloat16()
        for layer in self.layers[: self.first]:
            tokens = layer(tokens)
        return tokens  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings, float32 [N,D] of unit length, of what ``tokens`` gave."""
        for layer in self.layers[self.first : -1]:
            tokens = layer(tokens)
        seen = self.post_layernorm(self.layers[-1](tokens, seen=1)[:, 0].float())
        return F.normalize(seen @ self.projection.T, dim=-1)

    @torch.no_grad()
    def apply_changes(self, changes: Mapping[str, NDArray[np.float32]]) -> None:
        """Take what ``changes`` of another tower gave."""
        own = dict(self.named_parameters())
        for name, value in changes.items():
            own[name.removeprefix("encoder.")].copy_(torch.from_numpy(value))

    def changes(self) -> dict[str, NDArray[np.float32]]:
        """What was trained, by its name in ``tensors``; ``scale`` takes the place of ``weight`` there."""
        trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
        return {
            f"encoder.{name}" if name.startswith("layers.") else name: value.detach().float().numpy().copy()
            for name, value in trained.items()
        }


class _Norm(nn.Module):
    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(_tensor(tensors, f"{name}.weight"))
        self.bias = nn.Parameter(_tensor(tensors, f"{name}.bias"))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-5)


class _Linear(nn.Module):
    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], name: str) -> None:
        super().__init__()
        self.weight = nn.Buffer(_tensor(tensors, f"{name}.weight").bfloat16(), persistent=False)
        self.bias = nn.Parameter(_tensor(tensors, f"{name}.bias"))
        self.scale = nn.Parameter(torch.ones_like(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scale.to(x.dtype) + self.bias.to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], name: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            _Linear(tensors, f"{name}.{part}_proj") for part in ("q", "k", "v", "out")
        )

    def forward(self, x: Tensor, seen: int | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, _HEAD_WIDTH)).transpose(1, 2)
            for part in (self.q_proj(x[:, :seen]), self.k_proj(x), self.v_proj(x))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], name: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = _Linear(tensors, f"{name}.fc1"), _Linear(tensors, f"{name}.fc2")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], name: str) -> None:
        super().__init__()
        self.layer_norm1 = _Norm(tensors, f"{name}.layer_norm1")
        self.layer_norm2 = _Norm(tensors, f"{name}.layer_norm2")
        self.self_attn = _Attention(tensors, f"{name}.self_attn")
        self.mlp = _Mlp(tensors, f"{name}.mlp")

    def forward(self, x: Tensor, seen: int | None = None) -> Tensor:
        """bfloat16 [N,T,W] to the same; ``seen`` first tokens only are asked for, from all."""
        x = x[:, :seen] + self.self_attn(self.layer_norm1(x), seen)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


def _tensor(tensors: Mapping[str, NDArray[np.float32]], name: str) -> Tensor:
    return torch.from_numpy(tensors[name].copy())
