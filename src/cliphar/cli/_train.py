"""cliphar train: a recipe in, a bundle out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cliphar.errors import UsageError

__all__ = ["train"]


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in data.source=../photos")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what would run, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of a stopped run.")] = False,
    ray: Annotated[
        int | None, typer.Option(min=1, metavar="WORKERS", help="Train on a Ray cluster, in so many processes.")
    ] = None,
) -> None:
    """Train a bundle by a recipe. Stopped by a signal, it writes a checkpoint and exits with 128 + the signal."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError("training needs torch; run: pip install 'cliphar[train]'") from error
    from cliphar.cli._follow import following
    from cliphar.training import Stopped, Surroundings, leave_ranks, load_recipe
    from cliphar.training import train as run

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if show:
        print(loaded.model_dump_json(indent=1))
        return

    if ray is not None:
        from cliphar.training import train_on_ray

        bundle = train_on_ray(loaded, ray, resume=resume)
        print(f"{bundle.info.name} is ready at {bundle.path}")
        return
    speaks = os.environ.get("RANK", "0") == "0"  # the first of those that torchrun started
    try:
        with following() as (log, on_step):
            bundle = run(loaded, Surroundings(resume=resume, log=log, on_step=on_step))
    except Stopped as stopped:
        if speaks:
            print(f"cliphar: {stopped}", file=sys.stderr)
        leave_ranks(stopped.status)
        raise typer.Exit(stopped.status) from stopped
    if speaks:
        print(f"{bundle.info.name} is ready at {bundle.path}")
    leave_ranks(0)
