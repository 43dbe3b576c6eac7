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
    around, ranks, steps = run.around, run.around.ranks, recipe.epochs * len(batches)
    if not isinstance(objective, nn.Module):
        raise TypeError("an objective is a module")
    objective.to(run.device)
    objective.gather = ranks.gather
    module, held = ranks.wrap(objective)
    if recipe.compile:
        module.compile()
    trained = [p for p in held.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_groups(trained, recipe.weight_decay), run.lr)
    scaler = torch.amp.GradScaler(run.device.type, enabled=recipe.precision == "fp16")
    average = _Average(trained, recipe.ema)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    state = _State()
    _resume(state, run, held, optimizer, average, scaler)

    def save() -> None:
        content = state.to_dict() | {
            "identity": run.identity,
            "start": run.start,
            "model": ranks.weights(held),
            "optimizer": ranks.optimizer_state(held, optimizer),
            "scaler": scaler.state_dict(),
        }
        with average.in_place():
            content["average"] = ranks.weights(held)
        if ranks.rank == 0:
            save_checkpoint(run.checkpoint, content)

    saved, started, at_start, skipped = time.monotonic(), time.monotonic(), state.step, 0
    while state.epoch < recipe.epochs and not state.ended:
        first = state.step - state.epoch * len(batches)
        for batch in batches.epoch(state.epoch, first):
            factor = _rate(state.step, steps, recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = run.lr * factor
            torch.manual_seed(((run.seed << 40) + (state.step << 12) + ranks.rank) % 2**63)
            parts: dict[str, float] = {}
            for part in batch.to(run.device).split(recipe.accumulate):
                with _compiling(), torch.autocast(run.device.type, dtype, enabled=recipe.precision != "fp32"):
                    losses = module(part)
                scaler.scale(losses["loss"] / recipe.accumulate).backward()
                for name, value in losses.items():
                    parts[name] = parts.get(name, 0.0) + float(value.detach()) / recipe.accumulate
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            skipped += scaler.get_scale() < scale
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            average.follow(state.step)
            parts = {name: ranks.mean(value) for name, value in parts.items()}
            if not math.isfinite(parts["loss"]) and recipe.precision != "fp16":
                raise UsageError(f"the loss is {parts['loss']} at step {state.step}; lower train.lr ({run.lr:g})")
            state.loss_sum += parts["loss"]
            speed = (state.step - at_start) * recipe.batch_size / (time.monotonic() - started)
            around.on_step(
                StepReport(
                    state.step, steps, state.epoch, parts["loss"], run.lr * factor, speed, recipe.batch_size / speed
                )
            )
            rate_now = {"lr": run.lr * factor, "photos_per_s": speed}
            around.tracker.log_metrics({f"train/{k}": v for k, v in (parts | rate_now).items()}, state.step)
            stop = ranks.any(around.stop[0])
            if stop or ranks.any(int(time.monotonic() - saved > 60 * recipe.checkpoint_minutes)):
                save()
                saved = time.monotonic()
            if stop:
                raise Stopped(f"stopped at step {state.step} of {steps}; give --resume to go on", 128 + stop)
        with average.in_place():
            if held is not objective:
                ranks.load_weights(objective, ranks.weights(held))
            measured = {name: ranks.mean(value) for name, value in validate().items()}
            state.compare(measured, recipe.patience, lambda: ranks.weights(held))
        notes = " ".join(f"{name} {value:.4f}" for name, value in measured.items())
        line = f"epoch {state.epoch}/{recipe.epochs}: loss {state.loss_sum / len(batches):.4f} {notes}"
        around.tracker.log_metrics({f"val/{name}": value for name, value in measured.items()}, state.step)
        state.loss_sum = 0.0
        save()
        saved = time.monotonic()
        around.log(line)  # now, for a terminal that is closed takes no line
    made = state.step - at_start
    if skipped * 10 > made:
        around.log(f"fp16 left out {skipped} of {made} steps, as gradients overflowed; train for longer, or by bf16")
    ranks.load_weights(objective, state.best)
    return state.measured


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

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def compare(self, measured: dict[str, float], patience: int, weights: Callable[[], dict[str, Any]]) -> None:
        self.epoch += 1
        if not self.measured or measured["score"] > self.measured["score"]:
            self.measured, self.best, self.without_gain = measured, weights(), 0
        else:
            self.without_gain += 1
            self.ended = bool(patience) and self.without_gain >= patience


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


def _resume(
    state: _State,
    run: Run,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: _Average,
    scaler: torch.amp.GradScaler,
) -> None:
    around = run.around
    refuse_unasked(run.checkpoint, around.resume)
    kept = load_checkpoint(run.checkpoint)
    if kept is None:
        if around.resume:
            around.log("nothing to resume; starting from the beginning")
        return
    if (kept["identity"], kept.get("start", run.start)) != (run.identity, run.start):
        raise UsageError(f"{run.checkpoint} is of another recipe, model or data; remove it to start anew")
    for name in vars(state):
        setattr(state, name, kept[name])
    around.ranks.load_optimizer(objective, optimizer, kept["optimizer"])
    scaler.load_state_dict(kept["scaler"])
    if average.keep:
        around.ranks.load_weights(objective, kept["average"])
        average.values = [parameter.detach().clone() for parameter in average.parameters]
    around.ranks.load_weights(objective, kept["model"])
    around.log(f"resumed after step {state.step}")
