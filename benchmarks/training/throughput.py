"""Photos a second of cliphar's training loop beside a plain PyTorch loop: same model, views and losses, in turns.

python benchmarks/training/throughput.py [STEPS]

Ours is the loop of method full on mini with everything on: moving average, clipping, sentences as well as labels,
tracking to MLflow. The plain one is what a tutorial writes: a DataLoader, cross-entropy, AdamW. Both augment alike,
so what differs is what the loop itself costs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cliphar.bundle import packaged, read_bundle
from cliphar.models import load_towers
from cliphar.runtime import cpu_quota
from cliphar.training._augment import random_frames
from cliphar.training._batches import Batches, TrainItems
from cliphar.training._contrast import ContrastObjective, Losses
from cliphar.training._loop import Run, Surroundings, fit
from cliphar.training._method_recipe import LoopRecipe
from cliphar.training._tracking import open_tracker

TURNS, WARM, CLASSES, SIZE, BATCH = 3, 2, 15, 128, 32


class _Photos:
    def __init__(self, count: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 255, (count, 1, 192, 192, 3), np.uint8)

    def frames(self, i: int) -> NDArray[np.uint8]:
        return cast(NDArray[np.uint8], self.pixels[i])


class _Views(Dataset[tuple[Tensor, int]]):
    def __init__(self, photos: _Photos, recipe: LoopRecipe) -> None:
        self.photos, self.recipe = photos, recipe

    def __len__(self) -> int:
        return len(self.photos.pixels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        random, recipe = np.random.default_rng(i), self.recipe
        view = random_frames(
            self.photos.frames(i), SIZE, min_area=recipe.min_area, operations=0, magnitude=0.0, random=random
        )
        return torch.from_numpy(view[0]).permute(2, 0, 1), i % CLASSES


def _model() -> nn.Module:
    tower = load_towers(read_bundle(packaged("mini"))).image
    return tower.requires_grad_(True).eval()  # batch norms keep their statistics, in both


def ours(photos: _Photos, recipe: LoopRecipe, home: Path) -> float:
    """Seconds a step."""
    count = len(photos.pixels)
    targets = np.arange(count) % CLASSES
    items = TrainItems(cast(Any, photos), np.arange(count), targets, [[int(t)] for t in targets])
    sentences = F.normalize(torch.randn(CLASSES, 512), dim=-1)
    objective = ContrastObjective(_model(), sentences, sentences, None, 30.0, Losses(1.0, 1.0, 0.1, 0.0))
    times: list[float] = []
    tracker = open_tracker(["mlflow"], "throughput", home, lambda line: print(line, file=sys.stderr), home / "runs")
    around = Surroundings(tracker=tracker, on_step=lambda _: times.append(time.perf_counter()))
    run = Run(home / "checkpoint", "bench", 0, 1e-4, torch.device("cpu"), around)
    try:
        fit(objective, Batches([items], recipe, SIZE, 0), recipe, run, lambda: {"score": 0.0})
    finally:
        tracker.close()
        run.checkpoint.unlink(missing_ok=True)
    return (times[-1] - times[WARM - 1]) / (len(times) - WARM)


def plain(photos: _Photos, recipe: LoopRecipe) -> float:
    """Seconds a step."""
    model, head = _model(), nn.Linear(512, CLASSES)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 1e-4)
    times: list[float] = []
    for images, targets in DataLoader(_Views(photos, recipe), BATCH, shuffle=True, num_workers=cpu_quota()):
        pixels = images.float().contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(head(model(pixels)), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(time.perf_counter())
    return (times[-1] - times[WARM - 1]) / (len(times) - WARM)


def main(steps: int) -> None:
    photos = _Photos((steps + WARM) * BATCH)
    recipe = LoopRecipe(epochs=1, batch_size=BATCH, size=SIZE)
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(TURNS):
            found["plain"].append(plain(photos, recipe))
            found["ours"].append(ours(photos, recipe, Path(home)))
    rates = {name: BATCH / float(np.median(seconds)) for name, seconds in found.items()}
    print(", ".join(f"{name} {rate:.1f} photos/s" for name, rate in rates.items()))
    print(f"ours is {rates['ours'] / rates['plain']:.2f} of plain, median of {TURNS} turns of {steps} steps")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
