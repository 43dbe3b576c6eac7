"""Recipes in, bundles out."""

from cliphar.training._recipe import MiniRecipe, SpaceRecipe, load_recipe
from cliphar.training._run import run

__all__ = ["MiniRecipe", "SpaceRecipe", "load_recipe", "run"]
