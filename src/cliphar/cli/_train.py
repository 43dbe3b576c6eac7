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
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in data.root=../photos")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what would run, and stop.")] = False,
) -> None:
    """Train a bundle by a recipe; an interrupted training goes on from its last checkpoint."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError("training needs torch; run: pip install 'cliphar[train]'") from error
    from cliphar.training import load_recipe, run

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if show:
        print(loaded.model_dump_json(indent=1))
        return
    bundle = run(loaded, lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True))
    print(f"{bundle.info.name} is ready at {bundle.path}")
