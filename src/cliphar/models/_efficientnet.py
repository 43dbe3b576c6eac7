"""EfficientNet-Lite: MBConv blocks without squeeze-and-excite and with ReLU6, so it quantises well.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019
(https://arxiv.org/abs/1905.11946), in the Lite variant of the TensorFlow TPU repository. Module names
follow the PyTorch conversion of those weights, so its state dicts load unchanged.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["SCALES", "EfficientNetLite"]


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
SCALES = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}  # width, depth
_STEM, _HEAD = 32, 1280


def _round_width(width: int, scale: float) -> int:
    if scale == 1.0:
        return width
    scaled = width * scale
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class _SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which the ImageNet weights expect."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:
            return F.conv2d(x, self.weight, self.bias, self.stride, (pads[2], pads[0]), 1, self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


def _batch_norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class _MBConv(nn.Module):
    def __init__(self, width_in: int, stage: _Stage, stride: int, width_out: int, drop: float) -> None:
        super().__init__()
        hidden = width_in * stage.expand
        self.expands = stage.expand != 1
        if self.expands:
            self._expand_conv = _SameConv2d(width_in, hidden, 1, bias=False)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = _SameConv2d(hidden, hidden, stage.kernel, stride, groups=hidden, bias=False)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = _SameConv2d(hidden, width_out, 1, bias=False)
        self._bn2 = _batch_norm(width_out)
        self.residual = stride == 1 and width_in == width_out
        self.drop = drop
        self.random: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        if not self.residual:
            return y
        if self.training and self.drop:
            kept = torch.rand(y.shape[0], 1, 1, 1, generator=self.random) >= self.drop
            y = y * kept.to(y) / (1 - self.drop)
        total: Tensor = x + y
        return total


class EfficientNetLite(nn.Module):
    """Backbone to features of each place.

    Args:
        scale: ``lite0``, ``lite1`` or ``lite2``.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.

    ``forward`` takes float [N,3,H,W] in [-1, 1] and returns float [N,1280,H/32,W/32], rounded up. ``recompute`` trains
    with less memory and more time: the blocks' activations are computed again instead of kept.
    """

    out_features = _HEAD

    def __init__(self, scale: str, drop_path: float) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"unknown EfficientNet-Lite {scale!r}; choose one of {', '.join(SCALES)}")
        width_scale, depth_scale = SCALES[scale]
        self._conv_stem = _SameConv2d(3, _STEM, 3, 2, bias=False)
        self._bn0 = _batch_norm(_STEM)
        plan: list[tuple[int, _Stage, int, int]] = []
        width = _STEM
        for number, stage in enumerate(_STAGES):
            fixed_depth = number in (0, len(_STAGES) - 1)
            repeats = stage.repeats if fixed_depth else math.ceil(stage.repeats * depth_scale)
            width_out = _round_width(stage.width, width_scale)
            for repeat in range(repeats):
                plan.append((width, stage, stage.stride if repeat == 0 else 1, width_out))
                width = width_out
        self._blocks = nn.ModuleList(
            _MBConv(width_in, stage, stride, width_out, drop_path * i / len(plan))
            for i, (width_in, stage, stride, width_out) in enumerate(plan)
        )
        self._conv_head = _SameConv2d(width, _HEAD, 1, bias=False)
        self._bn1 = _batch_norm(_HEAD)
        self.recompute = False

    def first(self, blocks: int) -> list[nn.Module]:
        """The stem and the first ``blocks`` blocks; nothing for 0."""
        return [self._conv_stem, self._bn0, *list(self._blocks)[:blocks]] if blocks else []

    def draw_from(self, random: torch.Generator) -> None:
        """Draw the dropped paths from a generator of one's own, as replicas that train at once must; not together with
        ``recompute``."""
        for block in self._blocks:
            if isinstance(block, _MBConv):
                block.random = random

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return F.relu6(self._bn1(self._conv_head(x)))
