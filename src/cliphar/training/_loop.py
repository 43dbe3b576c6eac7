"""The training loop of every method that trains by gradients.

All that is random in a step (the batch, its views, mixup, dropout) comes from the seed and the step's number, and a
checkpoint holds the rest: so a run that is stopped or killed, and then resumed, ends with the same bits.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cliphar.errors import ClipharError, UsageError
from cliphar.training._batches import Batch, Batches
from cliphar.training._checkpoint import load_checkpoint, save_checkpoint
from cliphar.training._method_recipe import LoopRecipe
from cliphar.training._ranks import OneProcess, Ranks
from cliphar.training._tracking import NoTracker, Tracker

__all__ = [
    "Objective",
    "Run",
    "StepReport",
    "Stopped",
    "Surroundings",
    "fit",
    "pick_device",
    "refuse_unasked",
    "stop_on_signals",
]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(ClipharError):  # noqa: N818 - not an error
    """A signal asked the run to stop; it has written its checkpoint. ``status`` is the process's exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Objective(Protocol):
    """What a method trains: an ``nn.Module`` whose forward gives a batch's losses.

    ``forward`` returns the mean over this process's part of the batch, ``loss`` and its named parts. ``gather`` is
    set by the loop: it brings the rows of all processes together, in order, with gradients; in one process it is the
    identity.
    """

    gather: Callable[[Tensor], Tensor]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What is known after a step: ``photos_per_s`` counts all processes."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    photos_per_s: float
    seconds_per_step: float


@dataclass
class Surroundings:
    """What a run is told besides its recipe; ``stop`` holds the number of the signal that asked to stop, or 0."""

    resume: bool = False
    log: Callable[[str], None] = lambda _: None
    on_step: Callable[[StepReport], None] = lambda _: None
    tracker: Tracker = field(default_factory=NoTracker)
    ranks: Ranks = field(default_factory=OneProcess)
    stop: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Run:
    """Where and how a loop runs; ``identity`` and ``start`` digest what must be the same to take up a checkpoint."""

    checkpoint: Path
    identity: str
    seed: int
    lr: float
    device: torch.device
    around: Surroundings = field(default_factory=Surroundings)
    start: str = ""  # apart, for older checkpoints have none


@contextmanager
def stop_on_signals(stop: list[int]) -> Iterator[None]:
    """The first SIGTERM, SIGINT or SIGHUP is noted in ``stop[0]``; another ends the process, SIGHUP excepted."""

    def note(number: int, _: FrameType | None) -> None:
        stop[0] = number
        # a terminal that closes sends SIGHUP, and so does its shell
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # as on Ray, which has its own way to stop
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_device(recipe: LoopRecipe) -> torch.device:
    """The device that the recipe asks for, by itself a GPU if each process has one; sets what ``deterministic`` needs.

    Raises:
        UsageError: a GPU is asked for and there is none for each process.
    """
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if recipe.device == "cuda" and gpus < processes:
        seen = f"{gpus} for {processes} processes" if gpus else "no GPU"
        raise UsageError(f"train.device is cuda, but torch sees {seen} here; use auto or cpu")
    use_gpu = recipe.device != "cpu" and gpus >= processes
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(recipe.deterministic)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu")


class _Average:
    """Exponential moving average of the trained parameters."""

    def __init__(self, parameters: list[nn.Parameter], keep: float) -> None:
        self.parameters, self.keep = parameters, keep
        self.values = [parameter.detach().clone() for parameter in parameters] if keep else []

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if self.keep:
            # at first the average follows quickly, else it would be of the start for long
            keep = min(self.keep, step / (step + 10))
            torch._foreach_lerp_(self.values, list(self.parameters), 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands in the module while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=bool(self.keep)):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)


@contextmanager
def _compiling() -> Iterator[None]:
    """torch.compile compiles at the first call, and says why it cannot in a hundred lines."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed  # 0.7 s, which most runs can do without

        if not isinstance(error, BackendCompilerFailed):
            raise
        why = str(error.inner_exception).strip().splitlines()[0]
        raise UsageError(f"train.compile: nothing is compiled here ({why}); install g++ or leave it out") from error


def _rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to 0 (Loshchilov and Hutter, 2017)."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def fit(
    objective: Objective,
    batches: Batches,
    recipe: LoopRecipe,
    run: Run,
    validate: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Train; the objective then holds the weights of the best epoch (their moving average).

    Args:
        objective: the module, on the CPU, in the mode that it is to be trained in.
        validate: measures the module as it stands; ``score`` is what more is better of.

    Returns:
        What ``validate`` said of the best epoch.

    Raises:
        Stopped: a signal came; the checkpoint is written.
        UsageError: a checkpoint is there and was not asked for, or is of another run.
    """
    if not isinstance(objective, nn.Module):
        raise TypeError("an objective is a module")
    objective.to(run.device)
    objective.gather = run.around.ranks.gather
    loop = _Loop(objective, batches, recipe, run)
    while loop.state.epoch < recipe.epochs and not loop.state.ended:
        loop.train_epoch()
        loop.end_epoch(validate)
    made = loop.state.step - loop.at_start
    if loop.skipped * 10 > made:
        run.around.log(
            f"fp16 left out {loop.skipped} of {made} steps, as gradients overflowed; train for longer, or by bf16"
        )
    run.around.ranks.load_weights(objective, loop.state.best)
    return loop.state.measured


class _Loop:
    """What is trained, what trains it, and how far it is; ``held`` has the parameters, ``module`` is called."""

    def __init__(self, objective: nn.Module, batches: Batches, recipe: LoopRecipe, run: Run) -> None:
        self.objective, self.batches, self.recipe, self.run = objective, batches, recipe, run
        self.around, self.ranks, self.steps = run.around, run.around.ranks, recipe.epochs * len(batches)
        self.module, self.held = self.ranks.wrap(objective)
        if recipe.compile:
            self.module.compile()
        self.trained = [p for p in self.held.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(_groups(self.trained, recipe.weight_decay), run.lr)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=recipe.precision == "fp16")
        self.average = _Average(self.trained, recipe.ema)
        self.state = _State()
        self.resume()
        self.saved = self.started = time.monotonic()
        self.at_start, self.skipped = self.state.step, 0

    def train_epoch(self) -> None:
        """The epoch's steps, from where it was left; Stopped, with a checkpoint, if a signal came."""
        state, ranks = self.state, self.ranks
        for batch in self.batches.epoch(state.epoch, state.step - state.epoch * len(self.batches)):
            lr = self.run.lr * _rate(state.step, self.steps, self.recipe.warmup)
            losses = self.train_step(batch, lr)
            if not math.isfinite(losses["loss"]) and self.recipe.precision != "fp16":
                raise UsageError(f"the loss is {losses['loss']} at step {state.step}; lower train.lr ({self.run.lr:g})")
            state.loss_sum += losses["loss"]
            self.report(losses, lr)
            stop = ranks.any(self.around.stop[0])
            if stop or ranks.any(int(time.monotonic() - self.saved > 60 * self.recipe.checkpoint_minutes)):
                self.save()
            if stop:
                raise Stopped(f"stopped at step {state.step} of {self.steps}; give --resume to go on", 128 + stop)

    def train_step(self, batch: Batch, lr: float) -> dict[str, float]:
        """One step of the optimiser; the losses are means over the batch of all processes."""
        recipe, state, scaler, device = self.recipe, self.state, self.scaler, self.run.device
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(((self.run.seed << 40) + (state.step << 12) + self.ranks.rank) % 2**63)
        losses: dict[str, float] = {}
        for part in batch.to(device).split(recipe.accumulate):
            with _compiling(), torch.autocast(device.type, _DTYPES[recipe.precision], recipe.precision != "fp32"):
                found = self.module(part)
            scaler.scale(found["loss"] / recipe.accumulate).backward()
            for name, value in found.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach()) / recipe.accumulate
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, recipe.clip_norm)
        scaler.step(self.optimizer)
        scale = scaler.get_scale()
        scaler.update()
        self.skipped += scaler.get_scale() < scale
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.average.follow(state.step)
        return {name: self.ranks.mean(value) for name, value in losses.items()}

    def report(self, losses: dict[str, float], lr: float) -> None:
        state, batch_size = self.state, self.recipe.batch_size
        speed = (state.step - self.at_start) * batch_size / (time.monotonic() - self.started)
        self.around.on_step(
            StepReport(state.step, self.steps, state.epoch, losses["loss"], lr, speed, batch_size / speed)
        )
        metrics = losses | {"lr": lr, "photos_per_s": speed}
        self.around.tracker.log_metrics({f"train/{name}": value for name, value in metrics.items()}, state.step)

    def end_epoch(self, validate: Callable[[], dict[str, float]]) -> None:
        """Measure the moving average, keep it if it is the best, and write a checkpoint."""
        state, ranks = self.state, self.ranks
        with self.average.in_place():
            if self.held is not self.objective:
                ranks.load_weights(self.objective, ranks.weights(self.held))
            measured = {name: ranks.mean(value) for name, value in validate().items()}
            state.epoch += 1
            if not state.measured or measured["score"] > state.measured["score"]:
                state.measured, state.best, state.without_gain = measured, ranks.weights(self.held), 0
            else:
                state.without_gain += 1
                state.ended = bool(self.recipe.patience) and state.without_gain >= self.recipe.patience
        notes = " ".join(f"{name} {value:.4f}" for name, value in measured.items())
        loss = state.loss_sum / len(self.batches)
        self.around.tracker.log_metrics({f"val/{name}": value for name, value in measured.items()}, state.step)
        state.loss_sum = 0.0
        self.save()
        # now, for a terminal that is closed takes no line
        self.around.log(f"epoch {state.epoch}/{self.recipe.epochs}: loss {loss:.4f} {notes}")

    def save(self) -> None:
        content = vars(self.state) | {
            "identity": self.run.identity,
            "start": self.run.start,
            "model": self.ranks.weights(self.held),
            "optimizer": self.ranks.optimizer_state(self.held, self.optimizer),
            "scaler": self.scaler.state_dict(),
        }
        with self.average.in_place():
            content["average"] = self.ranks.weights(self.held)
        if self.ranks.rank == 0:
            save_checkpoint(self.run.checkpoint, content)
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Take up the checkpoint, if there is one."""
        run, around, ranks = self.run, self.around, self.ranks
        refuse_unasked(run.checkpoint, around.resume)
        kept = load_checkpoint(run.checkpoint)
        if kept is None:
            if around.resume:
                around.log("nothing to resume; starting from the beginning")
            return
        if (kept["identity"], kept.get("start", run.start)) != (run.identity, run.start):
            raise UsageError(f"{run.checkpoint} is of another recipe, model or data; remove it to start anew")
        for name in vars(self.state):
            setattr(self.state, name, kept[name])
        ranks.load_optimizer(self.held, self.optimizer, kept["optimizer"])
        self.scaler.load_state_dict(kept["scaler"])
        if self.average.keep:
            ranks.load_weights(self.held, kept["average"])
            self.average.values = [parameter.detach().clone() for parameter in self.average.parameters]
        ranks.load_weights(self.held, kept["model"])
        around.log(f"resumed after step {self.state.step}")


@dataclass
class _State:
    """How far the run is, and its best epoch; ``ended`` when patience has run out."""

    step: int = 0
    epoch: int = 0
    loss_sum: float = 0.0
    without_gain: int = 0
    ended: bool = False
    measured: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Biases and gains do not decay."""
    kinds = ((weight_decay, [p for p in parameters if p.ndim > 1]), (0.0, [p for p in parameters if p.ndim <= 1]))
    return [{"params": members, "weight_decay": decay} for decay, members in kinds if members]


def refuse_unasked(checkpoint: Path, resume: bool) -> None:
    """UsageError if there is a checkpoint and nobody asked to ``resume`` it."""
    if checkpoint.exists() and not resume:
        raise UsageError(
            f"a run was stopped before its end: {checkpoint}; give --resume to go on with it, or remove that file"
        )
