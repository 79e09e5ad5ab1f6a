"""What happens before the first step, of whatever stage: shapes and tokenizers are compared, and
what the stage learns from is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rorqual import weights
from rorqual.data import Advance, Generator, TokenizerSettings, loaded_tokenizer, silent
from rorqual.data.shards import tokenizer_hash
from rorqual.errors import ConfigError, TrainingError, UsageError
from rorqual.model import ModelConfig
from rorqual.tokenizer import Tokenizer, has_tokenizer
from rorqual.train.batches import TrainingData
from rorqual.train.checkpoint import find_checkpoint
from rorqual.train.recipe import Recipe
from rorqual.train.start import check_rows


def prepare(
    recipe: Recipe,
    generators: Mapping[str, Generator] | None = None,
    *,
    advance: Advance = silent,
) -> TrainingData:
    """Makes what the recipe's stage learns from, unless it is there; never downloads."""
    return recipe.preparation(config_of(recipe), generators or {}).make(advance)


def take_prepared(
    recipe: Recipe, generators: Mapping[str, Generator] | None = None
) -> TrainingData:
    """What another process made; UsageError where it is not."""
    data = recipe.preparation(config_of(recipe), generators or {}).find()
    if data is None:
        raise UsageError(
            "the data that the first rank made is not here",
            expected="folders that all ranks share",
            fix="put the recipe's folders and the run folder on a file system that all machines "
            "have",
        )
    return data


def config_of(recipe: Recipe) -> ModelConfig:
    """The shape of the model that the recipe trains, read from `init_from` where there is one."""
    if recipe.init_from is None:
        return recipe.model_config()
    return recipe.model_config(weights.load_config(find_checkpoint(recipe.init_from)))


def refuse_to_move_what_is_read(recipe: Recipe, run_folder: Path) -> None:
    """UsageError if a run that starts over would set aside a folder that its recipe reads."""
    root = run_folder.resolve()
    for key, folder in recipe.folders_read().items():
        if folder.resolve().is_relative_to(root):
            raise UsageError(
                f"starting over would move {key} away: it lies in the run folder",
                where=run_folder,
                found=f"{key} = {folder}",
                fix="give the new run another folder with --run",
            )


def tokenizer_settings(recipe: Recipe) -> TokenizerSettings:
    """[tokenizer], or that of the checkpoint in `init_from`."""
    if recipe.tokenizer is not None:
        return recipe.tokenizer
    if recipe.init_from is None:
        raise ConfigError("[tokenizer] is missing", fix="add it with a folder and a vocab_size")
    return TokenizerSettings.of_folder(find_checkpoint(recipe.init_from))


def check_tokenizer(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """The model has a row for each id, and a checkpoint's weights mean its own tokenizer's ids."""
    check_rows(config, tokenizer)
    if recipe.init_from is None:
        return
    folder = find_checkpoint(recipe.init_from)
    if not has_tokenizer(folder):
        return
    theirs = loaded_tokenizer(folder)
    if tokenizer_hash(theirs) != tokenizer_hash(tokenizer):
        raise TrainingError(
            "the checkpoint was trained with another tokenizer",
            where=folder,
            found=f"{theirs.vocab_size} ids",
            expected=f"that of [tokenizer], {tokenizer.vocab_size} ids",
            fix="leave [tokenizer] out of the recipe to use the checkpoint's",
        )
