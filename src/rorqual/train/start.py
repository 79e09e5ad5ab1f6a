"""The model that a run begins with: fresh, or the weights of `init_from`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from rorqual import weights
from rorqual.errors import TrainingError, listing
from rorqual.model import DeepseekV3, ModelConfig, build, empty
from rorqual.model.served import use_kernels
from rorqual.tokenizer import Tokenizer
from rorqual.train.checkpoint import find_checkpoint
from rorqual.train.ranks import OneRank, Ranks
from rorqual.train.recipe import Recipe


def start_model(
    recipe: Recipe, tokenizer: Tokenizer | None, ranks: Ranks | None = None
) -> DeepseekV3:
    """A fresh model of the recipe's shape, or the weights of `init_from` under its changes; of a
    pipeline's rank, its stages of that model.
    """
    config = _config(recipe)
    stages = (ranks or OneRank()).stages(config, recipe.training.sequence_length)
    if stages is not None:
        model = stages.part(config)
        if recipe.init_from is None:
            model.reset_parameters(torch.Generator().manual_seed(recipe.seed))
        else:
            _fill(model, find_checkpoint(recipe.init_from))
    elif recipe.init_from is None:
        model = build(recipe.model_config(), seed=recipe.seed)
    else:
        model = weights.load(find_checkpoint(recipe.init_from), "float32")
        if config != model.config:  # of rope scaling or the router, say: the weights are the same
            changed = empty(config)
            changed.load_state_dict(model.state_dict())
            changed.advice = model.advice
            model = changed
    if tokenizer is not None:
        check_rows(model.config, tokenizer)
    return model


def _config(recipe: Recipe) -> ModelConfig:
    if recipe.init_from is None:
        return recipe.model_config()
    folder = find_checkpoint(recipe.init_from)
    check_shape(recipe, folder)
    return recipe.model_config(weights.load_config(folder))


def saved_model(recipe: Recipe, folder: Path, ranks: Ranks) -> DeepseekV3:
    """The weights of a checkpoint of the recipe; of a pipeline's rank, those of its stages."""
    config = weights.load_config(folder)
    stages = ranks.stages(config, recipe.training.sequence_length)
    if stages is None:
        return weights.load(folder, "float32")
    model = stages.part(config)
    _fill(model, folder)
    return model


def _fill(model: DeepseekV3, folder: Path) -> None:
    weights.fill(model, folder)
    use_kernels(model)


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
