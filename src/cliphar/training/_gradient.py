"""What the methods that train towers have in common: from a job to trained towers in a bundle's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cliphar.data import SPLITS, PhotoSet, difference_hash, group_duplicates, load_photos, open_source
from cliphar.errors import DataError, UsageError
from cliphar.export import compress_weights, export_clip_text, export_image_tower
from cliphar.labels import prompts
from cliphar.media import to_square
from cliphar.models import WEIGHTS_FILE, Towers, load_towers, save_weights
from cliphar.training._batches import Batches, TrainItems, stack_views
from cliphar.training._contrast import ContrastObjective, Losses
from cliphar.training._finish import bias_photos
from cliphar.training._job import TEST, TRAIN, VAL, Job, Outcome
from cliphar.training._loop import Run, fit, pick_device, stop_on_signals
from cliphar.training._method_recipe import GradientRecipe
from cliphar.training._rates import learning_rate

__all__ = ["freeze", "train_towers"]


def train_towers(
    job: Job,
    recipe: GradientRecipe,
    *,
    prepare: Callable[[nn.Module], None] = lambda _: None,
    finish: Callable[[nn.Module], None] = lambda _: None,
    shares: Sequence[float] = (1.0,),
) -> Outcome:
    """Train, interpolate, export.

    Args:
        prepare: changes the towers before training, such as by adding to them.
        finish: and after it, such as by merging what was added.
        shares: of the trained weights in those kept, to choose from on the validation part.
    """
    towers = load_towers(job.bundle)
    lr = learning_rate(recipe.method, recipe.train.lr, transformer=towers.is_transformer, log=job.around.log)
    device = pick_device(recipe.train)
    sentences, of_label, items = _material(job, recipe, towers)
    losses = Losses(recipe.contrastive, recipe.classes, recipe.train.label_smoothing, recipe.train.mixup)
    vectors = torch.from_numpy(job.start_vectors())
    text = towers.text if recipe.contrastive else None
    objective = ContrastObjective(towers.image, vectors, sentences, text, towers.logit_scale, losses, of_label)
    trained = nn.ModuleDict({"image": towers.image} | ({"text": text} if text is not None else {}))
    trained.requires_grad_(True)
    if towers.text is not None:
        for name, value in towers.text.model.named_parameters(recurse=False):
            # scale and, of SigLIP, bias of pre-training's loss: cosines are scaled by what it says, and that stays
            value.requires_grad_(not name.startswith("logit_"))
    prepare(trained)
    freeze(objective, recipe.train.freeze)
    if recipe.train.checkpointing:
        towers.recompute()
    size = job.bundle.info.image.size
    if towers.is_transformer and recipe.train.size not in (None, size):
        raise UsageError(
            f"train.size is {recipe.train.size}, but '{job.bundle.info.name}' takes {size} pixels only; "
            "give train.size=null"
        )
    batches = Batches(
        items, recipe.train, recipe.train.size or size, recipe.seed, job.around.ranks.rank, job.around.ranks.world
    )
    start = {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in start.values())
    job.around.log(f"training {total:,} weights at {lr:g} on {device}, {len(batches)} steps an epoch")
    _train_mode(objective)
    validation = _Validation(job, objective, size)
    run = Run(
        checkpoint=checkpoint_of(recipe.output),
        identity=job.identity + "".join(one.photos.sha256 for one in items[1:]),
        seed=recipe.seed,
        lr=lr,
        device=device,
        around=job.around,
        start=_start(job),
    )
    with stop_on_signals(job.around.stop):
        measured = fit(objective, batches, recipe.train, run, validation)
    if tuple(shares) != (1.0,):
        _interpolate(objective, start, shares, measured["score"], validation, job.around.log)
    finish(trained)
    objective.cpu().eval()
    return Outcome(objective.label_vectors().numpy(), _export(towers, job))


def _start(job: Job) -> str:
    """A digest of what the labels start from: the vectors that the starting bundle has of them, and its text tower."""
    have = job.bundle.info.labels
    known = [label for label in job.labels if label in have]
    trained = job.bundle.class_vectors()[[have.index(label) for label in known]]
    about = json.dumps([known, job.bundle.info.files["text.onnx"].sha256])
    return hashlib.sha256(about.encode() + trained.tobytes()).hexdigest()


def checkpoint_of(output: Path) -> Path:
    """Where a run keeps its checkpoint until its bundle is written."""
    return output.with_name(f"{output.name}.checkpoint")


def freeze(objective: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose names fit a pattern stay as they are.

    Raises:
        UsageError: a pattern fits none, or nothing is left to train.
    """
    names = dict(objective.named_parameters())
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise UsageError(f"train.freeze: {pattern!r} fits no weight; there are {', '.join(list(names)[:3])}, ...")
        for name in fitting:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UsageError(f"train.freeze: {', '.join(patterns)} leave nothing to train")


def _train_mode(objective: nn.Module) -> None:
    """Training mode, but batch norms keep their statistics: a batch is small, and its parts are smaller."""
    objective.train()
    for module in objective.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _material(
    job: Job, recipe: GradientRecipe, towers: Towers
) -> tuple[Tensor, Sequence[Sequence[int]], list[TrainItems]]:
    """The sentences (embedded, or as ids if the text tower is trained), each label's, and the photos they stand for."""
    texts: list[str] = []
    of_label: list[list[int]] = []
    for label in job.labels:
        named, described = prompts(label, job.bundle.info.text.templates)
        of_label.append(list(range(len(texts), len(texts) + len(named) + len(described))))
        texts += named + described
    rows = job.rows(TRAIN)
    items = [TrainItems(job.photos, rows, job.targets[rows], [of_label[t] for t in job.targets[rows]])]
    if recipe.captions is not None:
        items.append(_captioned(job, recipe, recipe.captions, texts))
    if towers.tokenize is not None and recipe.contrastive:
        return towers.tokenize(texts), of_label, items
    runtime = job.base.runtime
    parts = [runtime.encode_text(texts[k : k + 256]) for k in range(0, len(texts), 256)]
    return torch.from_numpy(np.concatenate(parts)), of_label, items


def _captioned(job: Job, recipe: GradientRecipe, source: str, texts: list[str]) -> TrainItems:
    spec = job.bundle.info.image
    photos: PhotoSet = load_photos(
        open_source(source), recipe.data.cache, side=spec.size, max_aspect=spec.max_aspect, frames=1, log=job.around.log
    )
    told = zip(photos.captions, photos.splits, strict=True)
    rows = np.array([i for i, (its, split) in enumerate(told) if its and split in (None, SPLITS[TRAIN])], np.int64)
    kept = [job.photos.photo(int(i)) for part in (VAL, TEST) for i in job.rows(part)]
    groups = group_duplicates([difference_hash(one) for one in (*kept, *(photos.photo(int(i)) for i in rows))])
    seen = np.isin(groups[len(kept) :], groups[: len(kept)])
    if seen.any():
        job.around.log(f"captions: left out {seen.sum():,} photos of val and test")
    rows = rows[~seen]
    if not len(rows):
        raise DataError(f"captions: no photo of {source} to train on has a caption")
    numbers = []
    for i in rows:
        numbers.append(list(range(len(texts), len(texts) + len(photos.captions[i]))))
        texts += photos.captions[i]
    return TrainItems(photos, rows, np.full(len(rows), -1, np.int64), numbers)


class _Validation:
    """Top-1 by the labels' vectors on the validation part, 0..1, of the model as it stands: ``{"score": ...}``."""

    def __init__(self, job: Job, objective: ContrastObjective, size: int) -> None:
        self._objective, self._job, self._size = objective, job, size
        self._rows = job.rows(VAL)
        self._targets = torch.from_numpy(job.targets[self._rows])

    @torch.inference_mode()
    def __call__(self) -> dict[str, float]:
        objective = self._objective
        modes = {module: module.training for module in objective.modules()}
        objective.eval()
        device = objective.class_vectors.device
        embedded = torch.cat([objective.embed(pixels.to(device)).float().cpu() for pixels in self._pixels()])
        vectors = objective.label_vectors().cpu()
        hits = (embedded @ vectors.T).argmax(1) == self._targets
        for module, mode in modes.items():
            module.training = mode
        return {"score": float(hits.double().mean())}

    def _pixels(self) -> Iterator[Tensor]:
        for at in range(0, len(self._rows), 64):
            views = _views(self._job, self._rows[at : at + 64], self._size)
            yield torch.from_numpy(stack_views(views)).permute(0, 1, 4, 2, 3)


def _views(job: Job, rows: NDArray[np.int64], size: int) -> list[NDArray[np.uint8]]:
    """The frames of each photo or clip, uint8 [T,size,size,3], as they will be served."""
    aspect = job.bundle.info.image.max_aspect
    return [
        np.stack([to_square(Image.fromarray(frame), size, aspect) for frame in job.photos.frames(int(i))]) for i in rows
    ]


@torch.no_grad()
def _interpolate(
    objective: ContrastObjective,
    start: dict[str, Tensor],
    shares: Sequence[float],
    trained_score: float,
    validation: _Validation,
    log: Callable[[str], None],
) -> None:
    """Leave in the objective the mixture of starting and trained weights that validates best."""
    parameters = {name: p for name, p in objective.named_parameters() if name in start}
    end = {name: p.detach().clone() for name, p in parameters.items()}
    scores = {}

    def mix(share: float) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(start[name].to(parameter).lerp(end[name], share))

    for share in shares:
        mix(share)
        scores[share] = trained_score if share == 1 else validation()["score"]
    best = max(scores, key=lambda share: (scores[share], share))
    mix(best)
    log("share of trained weights: " + ", ".join(f"{share:g} {score:.4f}" for share, score in scores.items()))
    log(f"kept {best:g}")


def _export(towers: Towers, job: Job) -> dict[str, Path | bytes]:
    size, rows = job.bundle.info.image.size, job.rows(TRAIN)
    image = export_image_tower(towers.image, size)
    files: dict[str, Path | bytes] = {WEIGHTS_FILE: save_weights(towers)}
    if towers.text is None:
        image = compress_weights(image, np.concatenate(_views(job, bias_photos(rows), size)))
    else:
        files["text.onnx"] = export_clip_text(towers.text, job.bundle.info.text.context_length).SerializeToString()
    return files | {"image.onnx": image.SerializeToString()}
