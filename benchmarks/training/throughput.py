"""The training loop with everything on, against a plain PyTorch loop on the same model and photos, by turns.

python benchmarks/training/throughput.py PHOTOS [ROUNDS]     # such as ../shared/data/har15.tar

The plain loop reads the same decoded photos through a DataLoader with one worker, crops, flips, and takes steps. Ours
adds RandAugment, class-balanced sampling, a moving average of the weights, checks of the loss, a checkpoint and MLflow.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cliphar.bundle import find_bundle
from cliphar.data import PhotoSet, load_photos, open_source
from cliphar.models import load_towers
from cliphar.training._augment import random_frames
from cliphar.training._batches import Batch, Batches, TrainItems
from cliphar.training._contrast import ContrastObjective, Losses
from cliphar.training._loop import Run, fit
from cliphar.training._method_recipe import LoopRecipe
from cliphar.training._tracking import open_tracker

BATCH, STEPS, SIZE = 32, 12, 128


class _Views(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, photos: PhotoSet, targets: Any) -> None:
        self.photos, self.targets = photos, targets

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        random = np.random.default_rng(i)
        pixels = random_frames(self.photos.frames(i), SIZE, min_area=0.5, operations=0, magnitude=0, random=random)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2), int(self.targets[i])


def _objective(classes: int) -> ContrastObjective:
    towers = load_towers(find_bundle("mini"))
    towers.image.requires_grad_(True)
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(classes, 512), dim=-1)
    objective = ContrastObjective(towers.image, vectors, torch.zeros(1, 512), None, 30.0, Losses(0.0, 1.0, 0.1, 0.0))
    return objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _plain(photos: PhotoSet, targets: Any, classes: int) -> float:
    objective = _objective(classes)
    objective.eval()  # batch norms keep their statistics, as in ours
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-4)
    loader = DataLoader(_Views(photos, targets), BATCH, num_workers=1)
    began = 0.0
    for step, (images, wanted) in enumerate(loader):
        if step == 2:
            began = time.perf_counter()
        objective(Batch(images, wanted, torch.full_like(wanted, -1)))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return BATCH * (STEPS - 2) / (time.perf_counter() - began)


def _ours(photos: PhotoSet, targets: Any, classes: int, work: Path) -> float:
    objective = _objective(classes)
    objective.eval()
    recipe = LoopRecipe(epochs=1, batch_size=BATCH, size=SIZE, balanced=True, randaugment=2, ema=0.99, device="cpu")
    rows = np.arange(BATCH * STEPS)
    items = TrainItems(photos, rows, targets[rows], [()] * len(rows))
    seen: list[float] = []
    tracker = open_tracker(["mlflow"], "bench", work, print)
    run = Run(work / "checkpoint", "", 0, 1e-4, torch.device("cpu"), on_step=lambda _: seen.append(time.perf_counter()))
    run.tracker = tracker
    ended: list[float] = []

    def validate() -> dict[str, float]:
        ended.append(time.perf_counter())
        return {"score": 0.0}

    fit(objective, Batches([items], recipe, SIZE, 0), recipe, run, validate)
    tracker.close()
    (work / "checkpoint").unlink()
    return BATCH * (STEPS - 2) / (ended[0] - seen[1])


def main(source: str, rounds: int) -> None:
    """Print photos a second of both, round by round, and the median of the ratios."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        photos = load_photos(open_source(source), work / "cache", side=SIZE, max_aspect=1.25, frames=1, log=print)
        labels = sorted({str(label) for label in photos.labels})
        targets = np.array([labels.index(str(label)) for label in photos.labels], np.int64)
        ratios = []
        for _ in range(rounds):
            plain, ours = _plain(photos, targets, len(labels)), _ours(photos, targets, len(labels), work)
            ratios.append(ours / plain)
            print(f"plain {plain:.1f} photos/s, ours {ours:.1f}: {ratios[-1]:.2f}", flush=True)
        print(f"median of {rounds}: {np.median(ratios):.2f} of the plain loop")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
