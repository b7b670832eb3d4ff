"""Recipes: named sets of hyperparameters, as data. Options given in a file or on the command line override them."""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # The original workflow: Adam 0.001, batch 64, 10 epochs. These are the options' own defaults.
    "baseline": {},
}
