"""Training: the recipe, the loop, and all that a step is made of."""

from rorqual.train.batches import TrainingData
from rorqual.train.loop import Summary, run_lock, train
from rorqual.train.recipe import Recipe, load_recipe

__all__ = ["Recipe", "Summary", "TrainingData", "load_recipe", "run_lock", "train"]
