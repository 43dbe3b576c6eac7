"""Teach a small image tower a large one's space, and the labels along with it.

Feature distillation (Hinton et al., 2015; for CLIP, Wu et al., "TinyCLIP", 2023): the student's embedding is pulled
towards the teacher's (cosine), and the student must rank a bank of texts as the teacher does (KL). Labelled photos
also train through a softmax over class vectors. Mixup (Zhang et al., 2018), random resized crops, flips, colour
jitter and cutout (DeVries and Taylor, 2017); progressive resizing (Howard); an
exponential moving average of the weights is what is kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cliphar.errors import UsageError
from cliphar.models import ImageTower
from cliphar.training._augment import random_frames
from cliphar.training._checkpoint import load_checkpoint, save_checkpoint
from cliphar.training._recipe import DistillRecipe

__all__ = ["DistillData", "distill", "embed"]


@dataclass(frozen=True)
class DistillData:
    """What the student learns from.

    ``photos`` gives photo i as uint8 RGB [H,W,3]; ``teacher`` is float32 [N,D], unit length; ``targets`` int64 [N]
    is each photo's class or -1; ``class_vectors`` float32 [C,D] and ``bank`` float32 [B,D] are unit length.
    """

    photos: Callable[[int], NDArray[np.uint8]]
    teacher: NDArray[np.float32]
    targets: NDArray[np.int64]
    class_vectors: NDArray[np.float32]
    bank: NDArray[np.float32]


def _jitter(images: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and cutout on uint8-valued float [N,3,H,W]."""
    n, _, height, width = images.shape

    def factors(spread: float) -> Tensor:
        return torch.from_numpy(random.uniform(1 - spread, 1 + spread, n).astype(np.float32)).view(n, 1, 1, 1)

    images = images * factors(0.3)
    images = images.lerp(images.mean((1, 2, 3), keepdim=True), 1 - factors(0.3))
    images = images.lerp(images.mean(1, keepdim=True), 1 - factors(0.4))
    images = images.clamp(0, 255)
    for i in np.flatnonzero(random.random(n) < 0.25):
        h, w = int(height * random.uniform(0.15, 0.4)), int(width * random.uniform(0.15, 0.4))
        top, left = random.integers(0, height - h), random.integers(0, width - w)
        images[i, :, top : top + h, left : left + w] = 127.5
    return images


def _batches(
    data: DistillData, chosen: NDArray[np.int64], size: int, recipe: DistillRecipe, seed: int
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Augmented uint8-valued float batches and their photo numbers; decoded ahead on threads."""
    random = np.random.default_rng(seed)
    order = random.permutation(chosen)
    full = len(order) // recipe.batch_size * recipe.batch_size
    parts = order[:full].reshape(-1, recipe.batch_size)

    def make(job: tuple[NDArray[np.int64], int]) -> Tensor:
        numbers, job_seed = job
        local = np.random.default_rng(job_seed)
        views = [
            random_frames(
                data.photos(int(i))[None],
                size,
                min_area=recipe.min_area,
                operations=0,
                magnitude=0,
                random=local,
            )
            for i in numbers
        ]
        images = torch.from_numpy(np.concatenate(views)).permute(0, 3, 1, 2).float()
        return _jitter(images, local).contiguous(memory_format=torch.channels_last)

    jobs = [(numbers, int(random.integers(2**62))) for numbers in parts]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, jobs[0])
        for k, (numbers, _) in enumerate(jobs):
            images = ahead.result()
            if k + 1 < len(jobs):
                ahead = pool.submit(make, jobs[k + 1])
            yield images, numbers


class _Student(nn.Module):
    """The tower with its class vectors, and the loss of a batch; replicas share weights but not gradients."""

    def __init__(self, tower: ImageTower, class_vectors: Tensor, bank: Tensor, recipe: DistillRecipe) -> None:
        super().__init__()
        self.tower, self.recipe = tower, recipe
        self.class_vectors = nn.Parameter(class_vectors)
        self.register_buffer("bank", bank, persistent=False)

    def replica(self) -> _Student:
        twin = copy.deepcopy(self)
        for own, shared in zip(twin.parameters(), self.parameters(), strict=True):
            own.data = shared.data
        return twin

    def loss(self, images: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Sum over the batch; ``targets`` is float [N,C], rows of zeros where a photo has no label."""
        recipe, scale = self.recipe, self.recipe.logit_scale
        z = self.tower(images)
        bank: Tensor = self.get_buffer("bank")
        feature = 1 - (z * teacher).sum(-1)
        wanted = F.log_softmax(scale * teacher @ bank.T, -1)
        ranks = F.kl_div(F.log_softmax(scale * z @ bank.T, -1), wanted, log_target=True, reduction="none").sum(-1)
        logits = F.log_softmax(scale * z @ F.normalize(self.class_vectors, dim=-1).T, -1)
        spread = targets.sum(1, keepdim=True) / targets.shape[1]
        label = -(targets.lerp(spread, recipe.label_smoothing) * logits).sum(-1)
        parts = recipe.feature_weight * feature + recipe.rank_weight * ranks + recipe.label_weight * label
        total: Tensor = parts.sum()
        return total


def _optimizer(student: _Student, recipe: DistillRecipe) -> torch.optim.AdamW:
    backbone = [p for p in student.tower.backbone.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in backbone if p.ndim > 1], "lr": recipe.lr, "weight_decay": recipe.weight_decay},
            {"params": [p for p in backbone if p.ndim == 1], "lr": recipe.lr, "weight_decay": 0.0},
            {"params": student.tower.project.parameters(), "lr": recipe.lr * 2, "weight_decay": recipe.weight_decay},
            {"params": [student.class_vectors], "lr": recipe.lr * 0.1, "weight_decay": 0.0},
        ]
    )


def distill(
    tower: ImageTower,
    data: DistillData,
    train: NDArray[np.int64],
    recipe: DistillRecipe,
    *,
    checkpoint: Path,
    identity: str,
    seed: int,
    log: Callable[[str], None],
    validate: Callable[[ImageTower, Tensor], str] | None = None,
) -> ImageTower:
    """Train ``tower`` in place and return its moving average.

    An epoch is one pass over ``train`` (photo numbers). A checkpoint is written after each epoch and taken up again if
    there is one; ``identity`` is a digest of all that must be the same for that. ``validate`` is shown the moving
    average, with its class vectors, float [C,D], after each epoch and returns what to log.

    Each batch is shared out to ``recipe.replicas`` threads, each running a replica on one core: for these small
    convolutions that is 1.4 times as fast as threads within each operation.

    Raises:
        UsageError: the checkpoint is of another training.
    """
    tower.freeze_stem(recipe.frozen_blocks)
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student = _Student(tower, torch.from_numpy(data.class_vectors.copy()), torch.from_numpy(data.bank), recipe)
    average = copy.deepcopy(student)
    optimizer = _optimizer(student, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    sizes = [size for size, epochs in recipe.schedule for _ in range(epochs)]
    per_epoch = len(train) // recipe.batch_size
    step, first = 0, 0
    state = load_checkpoint(checkpoint)
    if state is not None:
        if state["identity"] != identity:
            raise UsageError(
                f"{checkpoint} is of another recipe, model or data; remove it, or choose another data.cache"
            )
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, first = state["step"], state["epoch"]
        log(f"resumed after epoch {first}")
    replicas = [student, *(student.replica() for _ in range(recipe.replicas - 1))]
    generators = [torch.Generator() for _ in replicas]  # they run at once, and must not draw from one
    for replica, generator in zip(replicas, generators, strict=True):
        replica.tower.backbone.draw_from(generator)
    teacher, targets = torch.from_numpy(data.teacher), torch.from_numpy(data.targets)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(recipe.replicas, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def backward(job: tuple[_Student, Tensor, Tensor, Tensor]) -> float:
            replica, *inputs = job
            loss = replica.loss(*inputs) / recipe.batch_size
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        for epoch in range(first, len(sizes)):
            started, total_loss = time.perf_counter(), 0.0
            for replica in replicas:
                replica.tower.train_unfrozen()
            random = np.random.default_rng((seed, epoch))
            for images, numbers in _batches(data, train, sizes[epoch], recipe, seed * 1000 + epoch):
                cosine = 0.5 * (1 + math.cos(math.pi * step / (per_epoch * len(sizes))))
                ramp = min(1.0, (step + 1) / recipe.warmup_steps)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * ramp * (0.02 + 0.98 * cosine)
                batch = _mixup(
                    images, teacher[numbers], _one_hot(targets[numbers], len(data.class_vectors)), recipe, random
                )
                for number, generator in enumerate(generators):
                    generator.manual_seed(((seed << 40) + (epoch << 30) + (step << 8) + number) % 2**63)
                shares = zip(replicas, *(tensor.chunk(len(replicas)) for tensor in batch), strict=True)
                total_loss += sum(pool.map(backward, shares))
                for replica in replicas[1:]:
                    for own, other in zip(student.parameters(), replica.parameters(), strict=True):
                        if other.grad is not None and own.grad is not None:
                            own.grad += other.grad
                            other.grad = None
                nn.utils.clip_grad_norm_(student.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                _follow(average, student, min(recipe.ema, (step + 1) / (step + 10)))
            seconds = time.perf_counter() - started
            torch.set_num_threads(threads_before)
            note = validate(average.tower, F.normalize(average.class_vectors.detach(), dim=-1)) if validate else ""
            torch.set_num_threads(1)
            log(
                f"epoch {epoch + 1}/{len(sizes)} at {sizes[epoch]} px: loss {total_loss / per_epoch:.4f} {note} "
                f"({per_epoch * recipe.batch_size / seconds:.0f} photos/s)"
            )
            save_checkpoint(
                checkpoint,
                {
                    "identity": identity,
                    "student": student.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "epoch": epoch + 1,
                },
            )
    torch.set_num_threads(threads_before)
    return average.tower


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    return F.one_hot(targets.clamp(min=0), classes).float() * (targets >= 0)[:, None]


def _mixup(
    images: Tensor, teacher: Tensor, targets: Tensor, recipe: DistillRecipe, random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    if not recipe.mixup:
        return images, teacher, targets
    share = float(random.beta(recipe.mixup, recipe.mixup))
    share = max(share, 1 - share)
    other = torch.from_numpy(random.permutation(len(images)))
    return (
        images.mul(share).add_(images[other], alpha=1 - share).contiguous(memory_format=torch.channels_last),
        F.normalize(share * teacher + (1 - share) * teacher[other], dim=-1),
        share * targets + (1 - share) * targets[other],
    )


@torch.no_grad()
def _follow(average: nn.Module, trained: nn.Module, keep: float) -> None:
    for own, new in zip(average.state_dict().values(), trained.state_dict().values(), strict=True):
        if own.dtype.is_floating_point:
            own.lerp_(new, 1 - keep)


@torch.inference_mode()
def embed(model: ImageTower, squares: Iterator[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Embeddings, float32 [N,D] of unit length, of uint8 [S,S,3] squares, of which there is one at least."""
    model.eval()
    batches = iter(lambda: list(islice(squares, 64)), [])
    return torch.cat(
        [model(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float()) for batch in batches]
    ).numpy()
