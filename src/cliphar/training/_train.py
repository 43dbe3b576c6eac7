"""Run any recipe."""

from __future__ import annotations

from cliphar.bundle import Bundle
from cliphar.training._gradient import checkpoint_of
from cliphar.training._job import Surroundings, open_job
from cliphar.training._loop import stop_on_signals
from cliphar.training._method_recipe import MethodRecipe
from cliphar.training._methods import METHODS
from cliphar.training._package import package
from cliphar.training._recipe import Recipe
from cliphar.training._run import run

__all__ = ["train"]


def train(recipe: Recipe, around: Surroundings | None = None) -> Bundle:
    """Train by ``recipe`` and write its bundle to ``recipe.output``.

    Raises:
        Stopped: a signal came while towers were trained; the checkpoint is written.
        BundleError, DataError, UsageError: the model, the photos or a setting is not right.
    """
    around = around or Surroundings()
    if not isinstance(recipe, MethodRecipe):
        return run(recipe, around.log)
    job = open_job(recipe, around)
    around.tracker.log_params(recipe.model_dump(mode="json"))
    try:
        with stop_on_signals(around.stop):
            outcome = METHODS[recipe.method](job)
        bundle = package(job, outcome)
        around.tracker.log_metrics(
            {f"{kind}/{name}": value for kind, m in bundle.info.metrics.items() for name, value in m.values.items()}, 0
        )
        around.tracker.log_artifact(bundle.path)
    finally:
        around.tracker.close()
    checkpoint_of(recipe.output).unlink(missing_ok=True)
    return bundle
