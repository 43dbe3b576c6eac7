"""Teach a small image tower a large one's space, and the labels along with it.

Feature distillation (Hinton et al., 2015; for CLIP, Wu et al., "TinyCLIP", 2023): the student's embedding is pulled
towards the teacher's (cosine), and the student must rank a bank of texts as the teacher does (KL). At each place of its
view it must see what the teacher's tokens see there (Romero et al., "FitNets", 2015), which tells of every photo some
thirty times as much as one embedding. Labelled photos also train through a softmax over class vectors. Mixup (Zhang et
al., 2018), CutMix (Yun et al., 2019), random resized crops, flips, colour jitter and cutout (DeVries and Taylor, 2017);
progressive resizing (Howard); of an exponential moving average of the weights, the mean at the ends of all cycles of
the learning rate is what is kept (SWA, Izmailov et al., 2018, https://arxiv.org/abs/1803.05407).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cliphar.errors import UsageError
from cliphar.models import ImageTower
from cliphar.training._augment import Crop, random_crop
from cliphar.training._checkpoint import load_checkpoint, save_checkpoint
from cliphar.training._recipe import DistillRecipe

__all__ = ["DistillData", "distill", "embed", "soft_labels"]

_TEACHER_SCALE = 40.0  # at about which its answers are calibrated


@dataclass(frozen=True)
class DistillData:
    """What the student learns from.

    ``photos`` gives photo i of N as uint8 RGB [H,W,3]; ``teacher`` is float32 [N,D], unit length; ``maps``, float16
    [N,P*P,M], is what the teacher sees at each place of the photo, cropped to ``max_aspect``; ``targets``, float32
    [N,C], are probabilities of the classes, zeros for a photo without a label; ``class_vectors`` float32 [C,D] and
    ``bank`` float32 [B,D] are unit length.
    """

    photos: Callable[[int], NDArray[np.uint8]]
    teacher: NDArray[np.float32]
    maps: NDArray[np.float16]
    max_aspect: float
    targets: NDArray[np.float32]
    class_vectors: NDArray[np.float32]
    bank: NDArray[np.float32]


def soft_labels(targets: NDArray[np.int64], cosines: NDArray[np.float32], recipe: DistillRecipe) -> NDArray[np.float32]:
    """Probabilities, float32 [N,C], of classes int64 [N], smoothed, and of the teacher's ``cosines`` [N,C] to the
    classes, in the shares that the recipe says; zeros where the class is -1."""
    classes = cosines.shape[1]
    hard = np.eye(classes, dtype=np.float32)[targets] * (1 - recipe.label_smoothing) + recipe.label_smoothing / classes
    soft = F.softmax(_TEACHER_SCALE * torch.from_numpy(cosines), -1).numpy()
    return np.where(targets[:, None] < 0, np.float32(0), (1 - recipe.soft) * hard + recipe.soft * soft)


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


class _Batch(NamedTuple):
    """``images`` uint8-valued float [N,3,S,S]; ``teacher`` [N,D] and ``targets`` [N,C] as in ``DistillData``;
    ``places`` [N,M,K,K], what the teacher sees at each place of the view, ``looked`` [N,K,K], how much of it it saw."""

    images: Tensor
    teacher: Tensor
    targets: Tensor
    places: Tensor
    looked: Tensor


def _grid(crop: Crop, shape: Sequence[int], max_aspect: float, cells: int) -> NDArray[np.float32]:
    """Where the middles of a view's cells are in the teacher's view, [cells,cells,2], its edges at -1 and 1."""
    height, width = shape[:2]
    seen_width, seen_height = min(width, max_aspect * height), min(height, max_aspect * width)
    along = (np.arange(cells) + 0.5) / cells
    x = crop.left + (1 - along if crop.flipped else along) * (crop.right - crop.left) - (width - seen_width) / 2
    y = crop.top + along * (crop.bottom - crop.top) - (height - seen_height) / 2
    across, down = np.meshgrid(2 * x / seen_width - 1, 2 * y / seen_height - 1)
    return np.stack([across, down], -1).astype(np.float32)


def _places(data: DistillData, numbers: NDArray[np.int64], crops: list[Crop], cells: int) -> tuple[Tensor, Tensor]:
    shapes = (data.photos(int(i)).shape for i in numbers)
    grids = [_grid(crop, shape, data.max_aspect, 2 * cells) for crop, shape in zip(crops, shapes, strict=True)]
    grid = torch.from_numpy(np.stack(grids))
    side = math.isqrt(data.maps.shape[1])
    maps = torch.from_numpy(data.maps[numbers].astype(np.float32)).transpose(1, 2).reshape(len(numbers), -1, side, side)
    looked = F.avg_pool2d((grid.abs().amax(-1) <= 1).float(), 2)
    return F.avg_pool2d(F.grid_sample(maps, grid, padding_mode="border", align_corners=False), 2), looked


def _batches(data: DistillData, size: int, recipe: DistillRecipe, seed: int) -> Iterator[_Batch]:
    """Augmented; decoded ahead on a thread."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(data.teacher))
    full = len(order) // recipe.batch_size * recipe.batch_size
    if not full:
        raise UsageError(f"distill.batch_size is {recipe.batch_size}, but there are {len(order)} photos to train on")
    parts = order[:full].reshape(-1, recipe.batch_size)
    teacher, targets = torch.from_numpy(data.teacher), torch.from_numpy(data.targets)

    def make(job: tuple[NDArray[np.int64], int]) -> _Batch:
        numbers, job_seed = job
        local = np.random.default_rng(job_seed)
        photos = [data.photos(int(i)) for i in numbers]
        crops = [random_crop(photo.shape, recipe.min_area, local) for photo in photos]
        views = [np.asarray(crop.of(photo, size)) for crop, photo in zip(crops, photos, strict=True)]
        images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float()
        images = _jitter(images, local).contiguous(memory_format=torch.channels_last)
        return _Batch(images, teacher[numbers], targets[numbers], *_places(data, numbers, crops, -(-size // 32)))

    jobs = [(numbers, int(random.integers(2**62))) for numbers in parts]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, jobs[0])
        for k in range(len(jobs)):
            batch = ahead.result()
            if k + 1 < len(jobs):
                ahead = pool.submit(make, jobs[k + 1])
            yield batch


class _Student(nn.Module):
    """The tower with its class vectors, and the loss of a batch."""

    def __init__(self, tower: ImageTower, data: DistillData, recipe: DistillRecipe) -> None:
        super().__init__()
        self.tower, self.recipe = tower, recipe
        self.places = nn.Conv2d(tower.backbone.out_features, data.maps.shape[2], 1)
        self.class_vectors = nn.Parameter(torch.from_numpy(data.class_vectors.copy()))
        self.register_buffer("bank", torch.from_numpy(data.bank), persistent=False)

    def loss(self, batch: _Batch) -> Tensor:
        """Sum over the batch."""
        recipe, scale = self.recipe, self.recipe.logit_scale
        features = self.tower.features(batch.images)
        z = self.tower.embed(features)
        bank: Tensor = self.get_buffer("bank")
        feature = 1 - (z * batch.teacher).sum(-1)
        unlike = 1 - F.cosine_similarity(self.places(features), batch.places, dim=1)
        place = (unlike * batch.looked).sum((1, 2)) / batch.looked.sum((1, 2)).clamp(min=1)
        wanted = F.log_softmax(scale * batch.teacher @ bank.T, -1)
        ranks = F.kl_div(F.log_softmax(scale * z @ bank.T, -1), wanted, log_target=True, reduction="none").sum(-1)
        label = -(batch.targets * F.log_softmax(scale * z @ F.normalize(self.class_vectors, dim=-1).T, -1)).sum(-1)
        parts = recipe.feature_weight * feature + recipe.place_weight * place
        total: Tensor = (parts + recipe.rank_weight * ranks + recipe.label_weight * label).sum()
        return total


class _Replicas:
    """Copies of the student, which share its weights but not its gradients, each run on a core by a thread of its own:
    for these small convolutions that is 1.4 times as fast as threads within each operation."""

    def __init__(self, student: _Student) -> None:
        self.all = [student, *(copy.deepcopy(student) for _ in range(student.recipe.replicas - 1))]
        self.generators = [torch.Generator() for _ in self.all]  # they run at once, and must not draw from one
        self.pool = ThreadPoolExecutor(len(self.all), initializer=torch.set_num_threads, initargs=(1,))
        for replica, generator in zip(self.all, self.generators, strict=True):
            replica.tower.backbone.draw_from(generator)
            for own, shared in zip(replica.parameters(), student.parameters(), strict=True):
                own.data = shared.data

    def backward(self, batch: _Batch, seed: int) -> float:
        """The batch's mean loss, whose gradients are then the student's."""
        for number, generator in enumerate(self.generators):
            generator.manual_seed((seed + number) % 2**63)
        shares = (_Batch(*part) for part in zip(*(one.chunk(len(self.all)) for one in batch), strict=True))
        loss = sum(self.pool.map(self._backward, self.all, shares))
        for replica in self.all[1:]:
            for own, other in zip(self.all[0].parameters(), replica.parameters(), strict=True):
                if other.grad is not None and own.grad is not None:
                    own.grad += other.grad
                    other.grad = None
        return loss

    @staticmethod
    def _backward(replica: _Student, share: _Batch) -> float:
        loss = replica.loss(share) / replica.recipe.batch_size
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


def _optimizer(student: _Student, recipe: DistillRecipe) -> torch.optim.AdamW:
    backbone = [p for p in student.tower.backbone.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in backbone if p.ndim > 1], "lr": recipe.lr, "weight_decay": recipe.weight_decay},
            {"params": [p for p in backbone if p.ndim == 1], "lr": recipe.lr, "weight_decay": 0.0},
            {
                "params": [*student.tower.project.parameters(), *student.places.parameters()],
                "lr": recipe.lr * 2,
                "weight_decay": recipe.weight_decay,
            },
            {"params": [student.class_vectors], "lr": recipe.lr * 0.1, "weight_decay": 0.0},
        ]
    )


def distill(
    tower: ImageTower,
    data: DistillData,
    recipe: DistillRecipe,
    *,
    checkpoint: Path,
    identity: str,
    seed: int,
    log: Callable[[str], None],
    validate: Callable[[ImageTower, Tensor], str] | None = None,
) -> ImageTower:
    """Train ``tower`` in place and return the mean of its moving averages at the ends of the cycles.

    An epoch is one pass over the photos. A checkpoint is written after each epoch and taken up again if
    there is one; ``identity`` is a digest of all that must be the same for that. ``validate`` is shown the moving
    average, with its class vectors, float [C,D], after each epoch and returns what to log.

    Raises:
        UsageError: the checkpoint is of another training, or there are fewer photos than one batch takes.
    """
    tower.freeze_stem(recipe.frozen_blocks)
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student = _Student(tower, data, recipe)
    average, mean = copy.deepcopy(student), copy.deepcopy(student)
    optimizer = _optimizer(student, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    cycles = [[size for size, epochs in cycle for _ in range(epochs)] for cycle in recipe.cycles]
    plan = [(number, size) for number, sizes in enumerate(cycles) for size in sizes]
    per_epoch = len(data.teacher) // recipe.batch_size
    step, first = 0, 0
    state = load_checkpoint(checkpoint)
    if state is not None:
        if state["identity"] != identity:
            raise UsageError(
                f"{checkpoint} is of another recipe, model or data; remove it, or choose another data.cache"
            )
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        step, first = state["step"], state["epoch"]
        log(f"resumed after epoch {first}")
    replicas = _Replicas(student)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    for epoch, (cycle, size) in islice(enumerate(plan), first, None):
        started, total_loss = time.perf_counter(), 0.0
        for replica in replicas.all:
            replica.tower.train_unfrozen()
        random = np.random.default_rng((seed, epoch))
        for batch in _batches(data, size, recipe, seed * 1000 + epoch):
            cosine = 0.5 * (1 + math.cos(math.pi * step / (per_epoch * len(cycles[cycle]))))
            ramp = min(1.0, (step + 1) / recipe.warmup_steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * ramp * (0.02 + 0.98 * cosine)
            mixed = _mix(batch, recipe, random)
            total_loss += replicas.backward(mixed, (seed << 40) + (epoch << 30) + (step << 8))
            nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            _follow(average, student, min(recipe.ema, (step + 1) / (step + 10)))
        seconds = time.perf_counter() - started
        if step == per_epoch * len(cycles[cycle]):
            _follow(mean, average, cycle / (cycle + 1))
            student.load_state_dict(mean.state_dict())
            average.load_state_dict(mean.state_dict())
            optimizer, step = _optimizer(student, recipe), 0
        torch.set_num_threads(threads_before)
        note = validate(average.tower, F.normalize(average.class_vectors.detach(), dim=-1)) if validate else ""
        torch.set_num_threads(1)
        log(
            f"epoch {epoch + 1}/{len(plan)} at {size} px: loss {total_loss / per_epoch:.4f} {note} "
            f"({per_epoch * recipe.batch_size / seconds:.0f} photos/s)"
        )
        save_checkpoint(
            checkpoint,
            {
                "identity": identity,
                "student": student.state_dict(),
                "average": average.state_dict(),
                "mean": mean.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "epoch": epoch + 1,
            },
        )
    torch.set_num_threads(threads_before)
    return mean.tower


def _mix(batch: _Batch, recipe: DistillRecipe, random: np.random.Generator) -> _Batch:
    other = torch.from_numpy(random.permutation(len(batch.images)))
    if random.random() < recipe.cutmix:
        return _cutmix(batch, other, random)
    if not recipe.mixup:
        return batch
    share = float(random.beta(recipe.mixup, recipe.mixup))
    share = max(share, 1 - share)
    images, teacher, targets, places = (share * one + (1 - share) * one[other] for one in batch[:4])
    images = images.contiguous(memory_format=torch.channels_last)
    return _Batch(images, F.normalize(teacher, dim=-1), targets, places, batch.looked * batch.looked[other])


def _cutmix(batch: _Batch, other: Tensor, random: np.random.Generator) -> _Batch:
    """A square of each view, half of it at most, is that of another; in whole cells, so that each place of it keeps
    what the teacher saw there."""
    cells = batch.looked.shape[-1]
    side = max(1, int(cells * math.sqrt(random.uniform(0, 0.5))))
    top, left = random.integers(0, cells - side + 1, 2) / cells

    def cut(whole: Tensor) -> Tensor:
        scale = whole.shape[-1]
        rows, columns = (slice(round(edge * scale), round((edge + side / cells) * scale)) for edge in (top, left))
        mixed = whole.clone()
        mixed[..., rows, columns] = whole[..., rows, columns][other]
        return mixed

    share = 1 - (side / cells) ** 2
    teacher, targets = (share * one + (1 - share) * one[other] for one in (batch.teacher, batch.targets))
    return _Batch(cut(batch.images), F.normalize(teacher, dim=-1), targets, cut(batch.places), cut(batch.looked))


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
