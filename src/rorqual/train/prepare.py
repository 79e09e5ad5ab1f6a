"""What happens before the first step: the data is built, the recipe and the data are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rorqual import weights
from rorqual.bundled import checkpoint_path
from rorqual.data import (
    BuildSummary,
    Generator,
    Isolation,
    Loader,
    TokenizerSettings,
    build,
    loaded_tokenizer,
    num_samples,
)
from rorqual.data.shards import tokenizer_hash
from rorqual.errors import ConfigError, TrainingError, UsageError
from rorqual.model import ModelConfig
from rorqual.tokenizer import Tokenizer, has_tokenizer
from rorqual.train.batches import TrainingData
from rorqual.train.checkpoint import find_checkpoint
from rorqual.train.notes import notes_of
from rorqual.train.recipe import Recipe
from rorqual.train.start import check_rows

# Changes whenever the same shards would be packed otherwise: a resume must not mix two packings.
PACKING_FORM = "packed whole, 1"


def prepare(
    recipe: Recipe,
    generators: Mapping[str, Generator] | None = None,
    *,
    workers: int = 1,
) -> TrainingData:
    """Builds the token shards unless they are there, and opens the loaders; never downloads."""
    config = config_of(recipe)
    summary = build(recipe.data, tokenizer_settings(recipe), generators, workers)
    return open_data(recipe, config, summary)


def open_data(recipe: Recipe, config: ModelConfig, summary: BuildSummary) -> TrainingData:
    """The loaders of a build that is whole; TrainingError if its tokenizer fits no model."""
    options = tokenizer_settings(recipe)
    tokenizer = loaded_tokenizer(options.path)
    check_tokenizer(recipe, config, tokenizer)
    loader = _loader(recipe, config, tokenizer)
    held_out = _held_out(recipe, tokenizer)
    notes = notes_of(recipe, config, options, tokenizer, summary, train=loader, held_out=held_out)
    return TrainingData(
        train=loader,
        tokenizer=tokenizer,
        held_out=held_out,
        num_held_out_samples=held_out.samples_per_pass if held_out else 0,
        digest=_digest(summary.manifests, loader),
        inputs=summary.inputs,
        packing=loader.packing,
        notes=tuple(notes),
    )


def config_of(recipe: Recipe) -> ModelConfig:
    """The shape of the model that the recipe trains, read from `init_from` where there is one."""
    if recipe.init_from is None:
        return recipe.model_config()
    return recipe.model_config(weights.load_config(find_checkpoint(recipe.init_from)))


def refuse_to_move_what_is_read(recipe: Recipe, run_folder: Path) -> None:
    """UsageError if a run that starts over would set aside a folder that its recipe reads."""
    read = {"data.folder": Path(recipe.data.folder), "data.corpora": Path(recipe.data.corpora)}
    if recipe.init_from is not None:
        read["init_from"] = checkpoint_path(recipe.init_from)
    if recipe.tokenizer is not None:
        read["tokenizer.folder"] = recipe.tokenizer.path
    root = run_folder.resolve()
    for key, folder in read.items():
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


def isolation_of(recipe: Recipe, tokenizer: Tokenizer) -> Isolation | None:
    """How the recipe keeps documents apart: not at all, packed whole, or where texts are cut."""
    if not recipe.is_isolated:
        return None
    return Isolation(
        begin_id=tokenizer.bos_id,
        user_id=tokenizer.user_id,
        assistant_id=tokenizer.assistant_id,
        is_whole=recipe.stage == "sft",
        splits_long=recipe.training.long_conversations == "split",
    )


def _loader(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer) -> Loader:
    return Loader(
        recipe.data.folders("train"),
        recipe.training.sequence_length,
        config.num_nextn_predict_layers,
        seed=recipe.seed,
        isolation=isolation_of(recipe, tokenizer),
    )


def _digest(manifests: dict[str, dict[str, dict[str, Any]]], loader: Loader) -> str:
    """Names the data: all manifests, and how documents were packed where that decides samples."""
    parts = [json.dumps(manifests, sort_keys=True)]
    if loader.packing is not None:
        parts.append(PACKING_FORM + json.dumps(asdict(loader.packing), sort_keys=True))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _held_out(recipe: Recipe, tokenizer: Tokenizer) -> Loader | None:
    """Held-out samples in a fixed random order, so that the first N are a fair part of all."""
    isolation = isolation_of(recipe, tokenizer)
    length = recipe.training.sequence_length
    folders = [
        (path, 1.0)
        for path, _ in recipe.data.folders("held_out")
        if num_samples(path, length, isolation)
    ]
    return Loader(folders, length, seed=0, isolation=isolation) if folders else None
