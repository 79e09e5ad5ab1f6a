"""The model that a run begins with: fresh, or the weights of `init_from`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rorqual import weights
from rorqual.errors import TrainingError, listing
from rorqual.model import DeepseekV3, ModelConfig, build, empty
from rorqual.tokenizer import Tokenizer
from rorqual.train.checkpoint import find_checkpoint
from rorqual.train.recipe import Recipe


def start_model(recipe: Recipe, tokenizer: Tokenizer | None) -> DeepseekV3:
    """A fresh model of the recipe's shape, or the weights of `init_from` under its changes."""
    if recipe.init_from is None:
        model = build(recipe.model_config(), seed=recipe.seed)
    else:
        folder = find_checkpoint(recipe.init_from)
        model = weights.load(folder, "float32")
        config = recipe.model_config(model.config)
        if config != model.config:
            model = _reshape(model, config, folder)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise TrainingError(
            "the tokenizer has more ids than the model has rows",
            found=f"{tokenizer.vocab_size} ids",
            expected=f"at most model.vocab_size {model.config.vocab_size}",
            fix="lower tokenizer.vocab_size or raise model.vocab_size",
        )
    return model


def _reshape(model: DeepseekV3, config: ModelConfig, where: Path) -> DeepseekV3:
    """The same weights under a config that changes no shape (rope scaling, router settings)."""
    changed, stored = empty(config), model.state_dict()
    shapes = {name: tensor.shape for name, tensor in changed.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in stored.items()}:
        old, new = asdict(model.config), asdict(config)
        moved = [f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]
        raise TrainingError(
            "[model] changes the shape of the checkpoint's tensors",
            where=where,
            found=listing(moved),
            expected="the checkpoint's sizes; its other settings may change",
            fix="remove the changes of sizes from [model]",
        )
    changed.load_state_dict(stored)
    return changed
