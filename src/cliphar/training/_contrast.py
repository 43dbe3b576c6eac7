"""The objective of the methods that train towers: photos against class vectors, and photos against sentences.

Sentences: the contrastive loss that CLIP was trained with, kept up in fine-tuning: Goyal et al., "Finetune like you
pretrain", 2023 (https://arxiv.org/abs/2212.00638); a label's prompts are its photos' sentences, and photos of one
label are positives of each other's: Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", 2022
(https://arxiv.org/abs/2204.03610). Mixup: Zhang et al., 2018 (https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliphar.training._batches import Batch

__all__ = ["ContrastObjective", "Losses"]


@dataclass(frozen=True)
class Losses:
    """Weights and shapes of the losses."""

    contrastive: float
    classes: float
    label_smoothing: float
    mixup: float


def _whole(z: Tensor) -> torch.autocast:
    """float32 whatever the towers are trained in: half precision has no digits for how cosines times 100 differ."""
    return torch.autocast(z.device.type, enabled=False)


class ContrastObjective(nn.Module):
    """Image tower, class vectors and, where it can be trained, text tower.

    Args:
        image: float [N,3,S,S] with values in 0..255 -> float [N,D], unit length.
        vectors: float [C,D], unit length: where the class vectors start.
        sentences: what ``Batch.texts`` numbers: float [M,D], unit length, if the text tower stays as it is, else
            token ids int64 [M,T].
        text: the text tower, int64 ids [N,T] -> float [N,D], unit length; None if it stays as it is.
        scale: what cosines are multiplied by.
        of_label: of each label the numbers of its sentences.
    """

    sentences: Tensor

    def __init__(
        self,
        image: nn.Module,
        vectors: Tensor,
        sentences: Tensor,
        text: nn.Module | None,
        scale: float,
        losses: Losses,
        of_label: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.image, self.text, self.of_label = image, text, of_label
        self.class_vectors = nn.Parameter(vectors.clone(), requires_grad=losses.classes > 0)
        self.register_buffer("sentences", sentences, persistent=False)
        self.scale, self.losses = scale, losses
        self.gather: Callable[[Tensor], Tensor] = lambda rows: rows

    def embed(self, images: Tensor) -> Tensor:
        """uint8 or float [B,T,3,S,S] -> float [B,D], unit length: the direction of the frames' mean."""
        count, frames = images.shape[:2]
        pixels = images.flatten(0, 1).float().contiguous(memory_format=torch.channels_last)
        found: Tensor = self.image(pixels)
        return found if frames == 1 else F.normalize(found.view(count, frames, -1).mean(1), dim=-1)

    @torch.no_grad()
    def label_vectors(self) -> Tensor:
        """The labels' vectors, float [C,D], unit length: as trained or, with no loss of theirs, of their words now."""
        if self.losses.classes:
            return F.normalize(self.class_vectors.float(), dim=-1)
        told = (self.sentences[list(numbers)] for numbers in self.of_label)
        means = [(one if self.text is None else self.text(one)).float().mean(0) for one in told]
        return F.normalize(torch.stack(means), dim=-1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean losses of a batch: ``loss`` is the weighted sum of ``classes`` and ``contrastive``."""
        images, share, other = batch.images, 1.0, torch.arange(len(batch.images), device=batch.images.device)
        if self.losses.mixup:
            share = float(torch.distributions.Beta(self.losses.mixup, self.losses.mixup).sample())
            other = torch.randperm(len(images)).to(images.device)
            images = images.float().mul(share).add_(images[other].float(), alpha=1 - share)
        z = self.embed(images).float()
        parts: dict[str, Tensor] = {}
        if self.losses.classes:
            with _whole(z):
                logits = self.scale * z @ F.normalize(self.class_vectors, dim=-1).T
            parts["classes"] = self._mixed(share, other, lambda rows: self._classify(logits, batch, rows))
        if self.losses.contrastive:
            parts["contrastive"] = self._mixed(share, other, lambda rows: self._contrast(z, batch, rows))
        weighted = [getattr(self.losses, name) * value for name, value in parts.items()]
        return {"loss": torch.stack(weighted).sum()} | parts

    @staticmethod
    def _mixed(share: float, other: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        own = loss(torch.arange(len(other), device=other.device))
        return own if share == 1.0 else share * own + (1 - share) * loss(other)

    def _classify(self, logits: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        targets, smoothing = batch.targets[rows], self.losses.label_smoothing
        losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none", label_smoothing=smoothing)
        return (losses * batch.weights[rows]).mean()

    def _contrast(self, z: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """``rows`` says whose sentence and label each photo has: its own, or those of the photo mixed into it."""
        numbers, targets = batch.texts[rows], batch.targets[rows]
        told = self.sentences[numbers.clamp(min=0)]
        texts = (told if self.text is None else self.text(told)).float()
        all_z, all_texts = self.gather(z), self.gather(texts)
        all_numbers, all_targets = self.gather(numbers), self.gather(targets)
        same = numbers[:, None] == all_numbers
        same |= (targets[:, None] == all_targets) & (targets >= 0)[:, None]
        wanted = same.float() * (all_numbers >= 0)
        wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1.0)
        spoken = numbers >= 0
        with _whole(z):
            to_texts = -(wanted * F.log_softmax(self.scale * z @ all_texts.T, -1)).sum(1)
            to_photos = -(wanted * F.log_softmax(self.scale * texts @ all_z.T, -1)).sum(1)
        return ((to_texts + to_photos) / 2 * spoken).sum() / spoken.sum().clamp(min=1)
