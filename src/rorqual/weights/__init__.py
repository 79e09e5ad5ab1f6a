"""Checkpoints: names of the tensors; reading, writing and converting every kind of them."""

from rorqual.weights.model_folder import ModelFolder
from rorqual.weights.model_reader import fill, load
from rorqual.weights.model_writer import save
from rorqual.weights.open import load_config

__all__ = ["ModelFolder", "fill", "load", "load_config", "save"]
