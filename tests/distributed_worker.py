"""One process of tests/test_distributed.py: trains a toy with the real loop, under torchrun or alone.

python distributed_worker.py KIND FOLDER NAME STOP_AFTER
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cliphar.training._batches import Batch, Batches, TrainItems
from cliphar.training._contrast import ContrastObjective, Losses
from cliphar.training._distributed import ManyProcesses, leave_ranks, open_ranks
from cliphar.training._loop import Run, StepReport, Stopped, Surroundings, fit
from cliphar.training._method_recipe import LoopRecipe

SIDE, CLASSES, PHOTOS, DIM, WORDS = 32, 3, 24, 8, 5


class Photos:
    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 255, (PHOTOS, 1, SIDE, SIDE, 3), np.uint8)

    def frames(self, i: int) -> Any:
        return self.pixels[i]


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.last = nn.Linear(16, DIM)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(F.adaptive_avg_pool2d(images / 127.5 - 1, 4).flatten(1))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return F.normalize(self.last(x), dim=-1)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.words(ids).mean(1), dim=-1)


def make() -> ContrastObjective:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (CLASSES * WORDS, 3))
    vectors = F.normalize(torch.randn(CLASSES, DIM), dim=-1)
    return ContrastObjective(Image(), vectors, ids, Text(), 10.0, Losses(1.0, 1.0, 0.1, 0.0))


def gradients_agree(ranks: Any) -> float:
    """Largest difference of the mean of the processes' gradients from the whole batch's gradient."""
    torch.manual_seed(1)
    images = torch.randint(0, 255, (8, 1, 3, SIDE, SIDE), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 0, 1, 2, -1, 1])
    texts = torch.tensor([0, 5, 10, 1, 6, 11, 3, 5])
    whole, part = make(), make()
    whole(Batch(images, targets, texts, torch.ones(8)))["contrastive"].backward()
    mine = slice(ranks.rank * 4, ranks.rank * 4 + 4)
    part.gather = ranks.gather
    part(Batch(images[mine], targets[mine], texts[mine], torch.ones(4)))["contrastive"].backward()
    worst = 0.0
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            dist.all_reduce(other.grad)
            worst = max(worst, float((one.grad - other.grad / ranks.world).abs().max()))
    return worst


def main(kind: str, folder: Path, name: str, stop_after: int) -> None:
    ranks = open_ranks(kind)
    recipe = LoopRecipe(epochs=3, batch_size=8, accumulate=2, size=SIDE, ema=0.5, lr=0.01)
    targets = np.arange(PHOTOS) % CLASSES
    texts = [[int(t) * WORDS + k for k in range(WORDS)] for t in targets]
    targets[::5] = -1  # photos with a caption alone, which each process gets more or fewer of
    items = TrainItems(cast(Any, Photos()), np.arange(PHOTOS), targets, texts)
    objective = make()
    curve: list[float] = []
    stop = [0]

    def on_step(report: StepReport) -> None:
        curve.append(report.loss)
        if report.step == stop_after:
            stop[0] = 15

    @torch.no_grad()
    def validate() -> dict[str, float]:
        pixels = torch.from_numpy(items.photos.frames(0)).permute(0, 3, 1, 2)[None]
        return {"score": len(curve) + float(objective.embed(pixels).abs().mean())}

    around = Surroundings(resume=True, on_step=on_step, ranks=ranks, stop=stop)
    run = Run(folder / f"{name}.checkpoint", "toy", 0, 0.01, torch.device("cpu"), around)
    with suppress(Stopped):
        fit(objective, Batches([items], recipe, SIDE, 0, ranks.rank, ranks.world), recipe, run, validate)
    worst = gradients_agree(ranks) if ranks.world > 1 else 0.0
    if ranks.rank == 0:
        group = ranks.waiting._get_backend(torch.device("cpu")) if isinstance(ranks, ManyProcesses) else None
        patience = group and group.options._timeout  # torch's own bound is thirty minutes, of NCCL ten
        written = {"curve": curve, "worst": worst, "patience_s": patience and patience.total_seconds()}
        (folder / f"{name}.json").write_text(json.dumps(written), encoding="utf-8")
        save_file({key: value.contiguous() for key, value in objective.state_dict().items()}, folder / f"{name}.st")
    leave_ranks(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
