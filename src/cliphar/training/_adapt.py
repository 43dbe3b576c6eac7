"""The last layers of the real CLIP tower, scaled and shifted for the known actions.

Labels pull their photos together while every embedding is held near to what the tower saw before, so that words keep
their meaning. The layers below stay as they are: what they make of a photo is computed once, and kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cliphar.models import ClipTower
from cliphar.training._checkpoint import load_checkpoint, save_checkpoint
from cliphar.training._corpus import TRAIN, VAL, Corpus
from cliphar.training._head import train_head
from cliphar.training._rates import warm_cosine
from cliphar.training._recipe import SpaceRecipe
from cliphar.training._teacher import look

__all__ = ["adapt"]

_CHUNK = 32


class _Tuned(nn.Module):
    def __init__(self, tower: ClipTower, vectors: NDArray[np.float32]) -> None:
        super().__init__()
        self.tower, self.vectors = tower, nn.Parameter(torch.from_numpy(vectors.copy()))


def adapt(
    tensors: dict[str, NDArray[np.float32]],
    corpus: Corpus,
    text: NDArray[np.float32],
    recipe: SpaceRecipe,
    log: Callable[[str], None],
) -> dict[str, NDArray[np.float32]]:
    """New values for some of ``tensors`` (``ClipTower``'s), by name, a matrix' ``scale`` among them.

    A run that was interrupted goes on after its last epoch.

    Args:
        text: float32 [C,D], unit length: the words of the known actions.
    """
    how = recipe.adapt
    torch.manual_seed(recipe.seed)
    tower = ClipTower(tensors, how.layers)
    rows = np.concatenate([corpus.select(part=TRAIN), corpus.select(source="actions", part=VAL)])
    tokens, before = look(tower, corpus, rows, recipe.teacher.max_aspect, how.layers, log)
    targets = corpus.targets(rows, corpus.actions)
    train, val = corpus.part[rows] == TRAIN, corpus.part[rows] == VAL
    acted, others = np.flatnonzero(train & (targets >= 0)), np.flatnonzero(train & (targets < 0))
    tuned = _Tuned(tower, train_head(before[acted], targets[acted], text, recipe.head, recipe.seed))
    trained = [value for value in tuned.parameters() if value.requires_grad]
    average = AveragedModel(tuned, multi_avg_fn=get_ema_multi_avg_fn(how.ema))  # type: ignore[no-untyped-call]
    followed = cast(_Tuned, average.module)
    optimizer = torch.optim.AdamW(trained, how.lr, weight_decay=0.0)
    known = min(max(1, how.batch_size - round(how.others * how.batch_size)), len(acted))
    per_epoch = len(acted) // known
    schedule = warm_cosine(optimizer, how.warmup_steps, per_epoch * how.epochs)
    words, was = torch.from_numpy(text), torch.from_numpy(before)

    def loss(numbers: NDArray[np.int64], share: float, random: np.random.Generator) -> Tensor:
        """Of photos with and, after the first ``known``, without an action; the former mixed with each other."""
        mixed = np.arange(len(numbers))
        mixed[:known] = random.permutation(known)
        x, wanted = _read(tokens, numbers), was[numbers]
        if share < 1:
            x = (share * x + (1 - share) * x[mixed]).bfloat16()
            wanted = F.normalize(share * wanted + (1 - share) * wanted[mixed], dim=-1)
        z = tower(x)
        logits = how.logit_scale * z[:known] @ F.normalize(tuned.vectors, dim=-1).T
        one, other = (
            F.cross_entropy(logits, torch.from_numpy(targets[of]), label_smoothing=how.label_smoothing)
            for of in (numbers[:known], numbers[mixed[:known]])
        )
        entropy = share * one + (1 - share) * other
        left = 1 - (z * wanted).sum(1).mean()
        away = (tuned.vectors - words).pow(2).sum(1).mean()
        return cast(Tensor, entropy + how.keep * left + recipe.head.pull * away)

    checkpoint = corpus.folder / f"{recipe.name}.ckpt"
    settings = recipe.model_dump(mode="json", include={"seed", "head", "adapt"})
    identity = hashlib.sha256(json.dumps([settings, corpus.part.tolist()]).encode() + before.tobytes()).hexdigest()
    state = load_checkpoint(checkpoint)
    first = 0
    if state and state["identity"] == identity:
        for part in (tuned, average, optimizer, schedule):
            part.load_state_dict(state[type(part).__name__])
        first = state["epoch"]
        log(f"adapt: goes on after epoch {first}")
    for epoch in range(first, how.epochs):
        started, total = time.perf_counter(), 0.0
        random = np.random.default_rng((recipe.seed, epoch))
        order = random.permutation(acted)
        for step in range(per_epoch):
            numbers = order[step * known : (step + 1) * known]
            numbers = np.concatenate([numbers, random.choice(others, how.batch_size - len(numbers))])
            now = loss(numbers, float(random.beta(how.mixup, how.mixup)) if how.mixup and step % 2 else 1.0, random)
            optimizer.zero_grad()
            now.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            average.update_parameters(tuned)
            total += now.item()
        z = _embed(followed.tower, tokens, np.flatnonzero(val))
        hits = (z @ F.normalize(followed.vectors.detach(), dim=-1).numpy().T).argmax(1) == targets[val]
        kept = (z * before[val]).sum(1).mean()
        log(
            f"adapt: epoch {epoch + 1}/{how.epochs}: loss {total / per_epoch:.4f} actions {hits.mean():.3f} "
            f"cosine {kept:.4f} ({per_epoch * how.batch_size / (time.perf_counter() - started):.0f} photos/s)"
        )
        parts = {type(part).__name__: part.state_dict() for part in (tuned, average, optimizer, schedule)}
        save_checkpoint(checkpoint, parts | {"identity": identity, "epoch": epoch + 1})
    checkpoint.unlink(missing_ok=True)
    return followed.tower.changes()


def _read(tokens: NDArray[np.int16], numbers: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens[numbers])).view(torch.bfloat16)


@torch.no_grad()
def _embed(tower: ClipTower, tokens: NDArray[np.int16], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    parts = (numbers[at : at + _CHUNK] for at in range(0, len(numbers), _CHUNK))
    return np.concatenate([tower(_read(tokens, part)).numpy() for part in parts])
