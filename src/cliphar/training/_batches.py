"""Batches in an order, and with views, that depend on seed and epoch alone: so a run can be taken up anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cliphar.data import PhotoSet
from cliphar.errors import UsageError
from cliphar.runtime import cpu_quota
from cliphar.training._augment import random_frames
from cliphar.training._method_recipe import LoopRecipe

__all__ = ["Batch", "Batches", "TrainItems", "stack_views"]


def stack_views(views: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """uint8 [T,S,S,3] each -> [N,T,S,S,3]; a photo among clips is a clip that stands still."""
    longest = max(len(view) for view in views)
    return np.stack([np.broadcast_to(view, (longest, *view.shape[1:])) for view in views])


@dataclass(frozen=True)
class TrainItems:
    """What is trained on: those of ``photos`` whose numbers are ``rows``, int64 [N].

    ``targets``, int64 [N], is the class of each or -1, and ``texts`` the numbers of the texts that may stand for it, of
    which there may be none.
    """

    photos: PhotoSet
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    texts: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 [B,T,3,S,S], ``targets`` int64 [B] (-1 for none), ``texts`` int64 [B]: a text's number or -1.

    ``weights`` float32 [B], of each photo in the mean loss of its class: those without one have 0, and their part goes
    to the others of the whole batch, so that a part that has few of them counts for less.
    """

    images: Tensor
    targets: Tensor
    texts: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def split(self, parts: int) -> list[Batch]:
        """Equal parts, in order."""
        chunks = (tensor.chunk(parts) for tensor in vars(self).values())
        return [Batch(*part) for part in zip(*chunks, strict=True)]


class Batches:
    """Batches of several sets of items in one order; prepared ahead on threads, which need no shared memory.

    Args:
        items: the sets; a photo's number is its place in their concatenation.
        recipe: sizes and augmentation.
        size: pixels of the views.
        seed: of order and views.
        rank, world: this process takes the ``rank``-th of ``world`` equal shares of every part of every batch.
    """

    def __init__(
        self, items: Sequence[TrainItems], recipe: LoopRecipe, size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._items, self._recipe, self._size, self._seed = list(items), recipe, size, seed
        self._starts = np.cumsum([0, *map(len, items)])
        self._targets = np.concatenate([one.targets for one in items])
        if recipe.batch_size % (world * recipe.accumulate):
            raise UsageError(
                f"train.batch_size {recipe.batch_size} is not a multiple of {world} processes times "
                f"train.accumulate {recipe.accumulate}"
            )
        # of each part that the batch is taken in, so that the parts of several processes together are those of one
        self._share = np.arange(recipe.batch_size).reshape(recipe.accumulate, world, -1)[:, rank].ravel()

    def __len__(self) -> int:
        """Steps in an epoch; photos that do not fill a batch wait for another epoch's order."""
        return max(1, len(self._targets) // self._recipe.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Photos' numbers, int64 [steps, batch_size]; with too few photos for one batch they repeat."""
        random = np.random.default_rng((self._seed, epoch))
        count, wanted = len(self._targets), len(self) * self._recipe.batch_size
        if self._recipe.balanced:
            _, inverse, counts = np.unique(self._targets, return_inverse=True, return_counts=True)
            weights = 1 / counts[inverse]
            chosen = random.choice(count, wanted, p=weights / weights.sum())
        else:
            chosen = np.concatenate([random.permutation(count) for _ in range(-(-wanted // count))])[:wanted]
        return chosen.reshape(len(self), -1)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from ``first_step`` on."""
        steps = list(enumerate(self.order(epoch)))[first_step:]
        with ThreadPoolExecutor(max(1, min(8, cpu_quota())), thread_name_prefix="augment") as pool:
            ahead: deque[list[Future[tuple[NDArray[np.uint8], int]]]] = deque()

            def submit(step: int, numbers: NDArray[np.int64]) -> None:
                jobs = zip(self._share.tolist(), numbers[self._share].tolist(), strict=True)
                ahead.append([pool.submit(self._view, epoch, step, place, number) for place, number in jobs])

            try:
                for step, numbers in steps[:2]:
                    submit(step, numbers)
                for place, (_, numbers) in enumerate(steps):
                    done = [future.result() for future in ahead.popleft()]
                    if place + 2 < len(steps):
                        submit(*steps[place + 2])
                    pixels = torch.from_numpy(stack_views([view for view, _ in done])).permute(0, 1, 4, 2, 3)
                    targets = torch.from_numpy(self._targets[numbers])
                    labelled = (targets >= 0).float()
                    yield Batch(
                        pixels.contiguous(),
                        targets[self._share],
                        torch.tensor([text for _, text in done]),
                        (labelled / labelled.mean().clamp(min=1e-9))[self._share],
                    )
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _view(self, epoch: int, step: int, place: int, number: int) -> tuple[NDArray[np.uint8], int]:
        which = int(np.searchsorted(self._starts, number, "right")) - 1
        items, i = self._items[which], number - int(self._starts[which])
        random = np.random.default_rng((self._seed, epoch, step, place))
        pixels = random_frames(
            items.photos.frames(int(items.rows[i])),
            self._size,
            min_area=self._recipe.min_area,
            operations=self._recipe.randaugment,
            magnitude=self._recipe.magnitude,
            random=random,
        )
        texts = items.texts[i]
        return pixels, int(texts[int(random.integers(len(texts)))]) if texts else -1
