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
        check_shape(recipe, folder)
        model = weights.load(folder, "float32")
        config = recipe.model_config(model.config)
        if config != model.config:  # of rope scaling or the router, say: the weights are the same
            changed = empty(config)
            changed.load_state_dict(model.state_dict())
            changed.advice = model.advice
            model = changed
    if tokenizer is not None:
        check_rows(model.config, tokenizer)
    return model


def check_rows(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """TrainingError if the tokenizer has ids for which the model has no row."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TrainingError(
            "the tokenizer has more ids than the model has rows",
            found=f"{tokenizer.vocab_size} ids",
            expected=f"at most model.vocab_size {config.vocab_size}",
            fix="lower tokenizer.vocab_size or raise model.vocab_size",
        )


def check_shape(recipe: Recipe, folder: Path) -> None:
    """TrainingError if [model] changes the shape of a tensor of the checkpoint."""
    base = weights.load_config(folder)
    config = recipe.model_config(base)
    if config == base:
        return
    before, after = (
        {name: tuple(value.shape) for name, value in empty(c, device="meta").state_dict().items()}
        for c in (base, config)
    )
    if before != after:
        old, new = asdict(base), asdict(config)
        raise TrainingError(
            "[model] changes the shape of the checkpoint's tensors",
            where=folder,
            found=listing(
                [f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]
            ),
            expected="the checkpoint's sizes; its other settings may change",
            fix="remove the changes of sizes from [model]",
        )
