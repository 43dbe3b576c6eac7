"""Recipes in, bundles out."""

from cliphar.training._distributed import first_speaks, is_first, leave_ranks
from cliphar.training._loop import StepReport, Stopped, Surroundings
from cliphar.training._method_recipe import MethodRecipe
from cliphar.training._ray import train_on_ray
from cliphar.training._recipe import MiniRecipe, Recipe, SpaceRecipe, load_recipe
from cliphar.training._tracking import NoTracker, Tracker
from cliphar.training._train import train

__all__ = [
    "MethodRecipe",
    "MiniRecipe",
    "NoTracker",
    "Recipe",
    "SpaceRecipe",
    "StepReport",
    "Stopped",
    "Surroundings",
    "Tracker",
    "first_speaks",
    "is_first",
    "leave_ranks",
    "load_recipe",
    "train",
    "train_on_ray",
]
