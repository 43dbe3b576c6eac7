"""cliphar train: a recipe in, a bundle out."""

from __future__ import annotations

import sys
import time
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
) -> None:
    """Train a bundle by a recipe. Stopped by a signal, it writes a checkpoint and exits with 128 + the signal."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError("training needs torch; run: pip install 'cliphar[train]'") from error
    from cliphar.training import Stopped, Surroundings, load_recipe
    from cliphar.training import train as run

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if show:
        print(loaded.model_dump_json(indent=1))
        return

    def log(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

    try:
        bundle = run(loaded, Surroundings(resume=resume, log=log))
    except Stopped as stopped:
        print(f"cliphar: {stopped}", file=sys.stderr)
        raise typer.Exit(stopped.status) from stopped
    print(f"{bundle.info.name} is ready at {bundle.path}")
