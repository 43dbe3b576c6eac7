"""Run any recipe."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cliphar.bundle import BUNDLE_JSON, Bundle, check_place, read_bundle
from cliphar.errors import UsageError
from cliphar.evaluation import write_report
from cliphar.training._distributed import open_ranks
from cliphar.training._gradient import checkpoint_of
from cliphar.training._job import Job, Outcome, open_job
from cliphar.training._loop import Stopped, Surroundings, pick_device, refuse_unasked
from cliphar.training._method_recipe import GradientRecipe, MethodRecipe
from cliphar.training._methods import METHODS
from cliphar.training._package import package
from cliphar.training._recipe import Recipe
from cliphar.training._run import run
from cliphar.training._tracking import NoTracker, open_tracker

__all__ = ["refuse_several", "train"]


def train(recipe: Recipe, around: Surroundings | None = None) -> Bundle:
    """Train by ``recipe`` and write its bundle to ``recipe.output``.

    Raises:
        Stopped: a signal came while towers were trained; the checkpoint is written.
        BundleError, DataError, UsageError: the model, the photos or a setting is not right.
    """
    _check_place(recipe.output)
    with _only(recipe.output):
        return _train(recipe, around or Surroundings())


def _train(recipe: Recipe, around: Surroundings) -> Bundle:
    checkpoint = checkpoint_of(recipe.output)
    gradient = recipe if isinstance(recipe, GradientRecipe) else None
    if gradient:  # before photos are read and a tracker has a run that fails
        refuse_unasked(checkpoint, around.resume)
    ranks = open_ranks(gradient.train.distributed, pick_device(gradient.train)) if gradient else open_ranks()
    refuse_several(recipe, ranks.world, "torchrun")
    if not isinstance(recipe, MethodRecipe):
        return run(recipe, around.log)
    around = replace(around, ranks=ranks)
    begun = checkpoint if gradient else recipe.output  # what a stopped training left is not another method's
    runs = begun.with_name(f"{begun.name}.runs")  # where it is recorded, to go on there
    if ranks.rank:  # the first process speaks for all
        around = replace(around, log=lambda _: None, on_step=lambda _: None, tracker=NoTracker())
    else:
        if not (gradient and checkpoint.exists()):
            runs.unlink(missing_ok=True)
        if recipe.track:
            tracker = open_tracker(recipe.track, recipe.name, recipe.output.parent, around.log, runs)
            around = replace(around, tracker=tracker)
    stopped = False
    try:
        with ranks.first():  # it fills the caches that the others then read
            job = open_job(recipe, around)
        around.tracker.log_params(recipe.model_dump(mode="json") | {"processes": ranks.world})
        outcome = METHODS[recipe.method](job)
        if not ranks.rank:
            _keep(job, outcome)
        ranks.wait()
    except (Stopped, KeyboardInterrupt):
        stopped = True
        raise
    finally:
        around.tracker.close(stopped=stopped)
        if not ranks.rank and not (gradient and checkpoint.exists()):
            runs.unlink(missing_ok=True)
    return read_bundle(recipe.output)


def refuse_several(recipe: Recipe, processes: int, launcher: str) -> None:
    """UsageError if ``launcher`` starts several processes, and the recipe's method takes one."""
    if processes > 1 and not isinstance(recipe, GradientRecipe):
        what = recipe.method if isinstance(recipe, MethodRecipe) else recipe.kind
        raise UsageError(f"'{what}' runs in one process; leave {launcher} out")


@contextmanager
def _only(output: Path) -> Iterator[None]:
    """UsageError if another training of this machine is at ``output``: both would write one checkpoint."""
    if not sys.platform.startswith("linux"):  # which alone has names that vanish with their process, however it ends
        yield
        return
    root = Path("/").stat()  # containers on the host's network share such names, and not their files
    place = f"{root.st_dev} {root.st_ino} {output.resolve()}".encode(errors="surrogateescape")
    # one for each of torchrun's processes: all fail alike, and none waits for the first
    name = f"{hashlib.sha256(place).hexdigest()}-{os.environ.get('RANK', '0')}"
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind(f"\0cliphar-train-{name}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # not a sandbox without such names
                raise UsageError(f"another training is at {output}; stop it, or choose another output") from error
        yield


def _check_place(output: Path) -> None:
    """What cannot be written is said before the hours that it takes, not after."""
    if output.name in ("", ".."):
        raise UsageError(f"cannot write {output}: a folder is replaced from outside; name it, as output=runs/mine")
    check_place(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / BUNDLE_JSON).is_file()):
        raise UsageError(f"cannot write {output}: it exists and is not a bundle; choose another output")


def _keep(job: Job, outcome: Outcome) -> None:
    """Write the bundle, and beside it its report; hand both to the tracker."""
    recipe, tracker = job.recipe, job.around.tracker
    bundle, evaluation = package(job, outcome)
    report = recipe.output.with_name(f"{recipe.output.name}.html")
    write_report(report, evaluation)
    for kind, metrics in bundle.info.metrics.items():
        tracker.log_metrics({f"{kind}/{name}": value for name, value in metrics.values.items()}, 0)
    tracker.log_artifact(report)
    tracker.log_artifact(bundle.path)
    job.around.log(f"report: {report}")
    if isinstance(recipe, GradientRecipe):
        checkpoint_of(recipe.output).unlink(missing_ok=True)
