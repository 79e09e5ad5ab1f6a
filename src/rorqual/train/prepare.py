"""What happens before the first step: the data is built, the recipe and the data are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rorqual import weights
from rorqual.data import (
    DataSettings,
    Document,
    Isolation,
    Loader,
    TokenizerSettings,
    build,
    num_samples,
)
from rorqual.data.shards import MANIFEST, tokenizer_hash
from rorqual.data.sources import source_record
from rorqual.errors import ConfigError, DataError, TrainingError, UsageError, listing
from rorqual.log import console
from rorqual.model import ModelConfig, empty
from rorqual.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from rorqual.train.batches import TrainingData
from rorqual.train.checkpoint import find_checkpoint
from rorqual.train.lr_schedule import in_tokens
from rorqual.train.recipe import Recipe

# Changes whenever the same shards would be packed otherwise: a resume must not mix two packings.
PACKING_FORM = "packed whole, 1"
Generator = Callable[[int, int], Iterator[Document]]


def prepare(
    recipe: Recipe,
    recipe_file: Path,
    generators: Mapping[str, Generator] | None = None,
    *,
    workers: int = 1,
) -> TrainingData:
    """Builds the token shards unless they are there, and opens the loaders; never downloads."""
    config = config_of(recipe)
    missing = missing_sources(recipe.data)
    if missing:
        raise DataError(
            f"these sources have not been fetched: {listing(missing)}",
            where=recipe.data.corpora,
            fix=f"rorqual data fetch {recipe_file}",
        )
    options = _tokenizer_settings(recipe)
    summary = build(recipe.data, options, generators, workers)
    tokenizer = load_tokenizer(options.folder)
    _check_tokenizer(recipe, tokenizer)
    loader = _loader(recipe, config, tokenizer)
    held_out = _held_out(recipe, tokenizer)
    return TrainingData(
        train=loader,
        tokenizer=tokenizer,
        held_out=held_out,
        num_held_out_samples=held_out.samples_per_pass if held_out else 0,
        digest=_digest(summary.manifests, loader),
        packing=loader.packing,
    )


def config_of(recipe: Recipe) -> ModelConfig:
    """The shape of the model that the recipe trains, read from `init_from` where there is one."""
    if recipe.init_from is None:
        return recipe.model_config()
    return recipe.model_config(weights.load_config(find_checkpoint(recipe.init_from)))


def missing_sources(data: DataSettings) -> list[str]:
    """The package-shipped sources of a recipe that lie in no corpora folder yet."""
    return [
        source.name
        for source in data.sources
        if source.name and source.path is None and not source.is_generated
        if source_record(source.name, Path(data.corpora)) is None
    ]


def refuse_to_move_what_is_read(recipe: Recipe, run_folder: Path) -> None:
    """UsageError if a run that starts over would set aside a folder that its recipe reads."""
    tokenizer = recipe.tokenizer.folder if recipe.tokenizer is not None else None
    read = {"init_from": recipe.init_from, "data.folder": recipe.data.folder}
    read |= {"tokenizer.folder": tokenizer, "data.corpora": recipe.data.corpora}
    root = run_folder.resolve()
    for key, folder in read.items():
        if folder is not None and Path(folder).resolve().is_relative_to(root):
            raise UsageError(
                f"starting over would move {key} away: it lies in the run folder",
                where=run_folder,
                found=f"{key} = {folder}",
                fix="give the new run another folder with --run",
            )


def show_plan(recipe: Recipe, run_folder: Path) -> None:
    """Prints what a run would do."""
    from rich.table import Table

    config = config_of(recipe)
    model = empty(config, device="meta")
    total = recipe.training.total_tokens
    ends = recipe.lr_schedule.phase_ends(total)
    names = ("linear to peak", "constant", "cosine to low", "constant at low")
    missing = missing_sources(recipe.data)
    rows = [
        ("run folder", str(run_folder)),
        ("stage", recipe.stage),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("MTP depth", str(config.num_nextn_predict_layers)),
        ("tokens", f"{total:,}"),
        ("batch", f"{recipe.batch_ramp.start} to {recipe.batch_ramp.end} sequences"),
        *[(f"{name} until", f"{end:,} tokens") for name, end in zip(names, ends, strict=True)],
        ("router bias moves until", f"{in_tokens(recipe.balance.bias_until, total):,} tokens"),
        ("sources", ", ".join(source.label for source in recipe.data.sources)),
        ("sources to fetch", ", ".join(missing) or "none"),
        ("targets", _learnt(recipe, config)),
    ]
    table = Table(box=None, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console().print(table)


def _tokenizer_settings(recipe: Recipe) -> TokenizerSettings:
    if recipe.tokenizer is not None:
        return recipe.tokenizer
    if recipe.init_from is None:
        raise ConfigError("[tokenizer] is missing", fix="add it with a folder and a vocab_size")
    return TokenizerSettings(folder=str(find_checkpoint(recipe.init_from)))


def _check_tokenizer(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """A checkpoint's weights mean its own tokenizer's ids."""
    if recipe.init_from is None:
        return
    folder = find_checkpoint(recipe.init_from)
    if not has_tokenizer(folder):
        return
    theirs = load_tokenizer(folder)
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


def _learnt(recipe: Recipe, config: ModelConfig) -> str:
    """What an epoch learns, of the token shards as they are."""
    if recipe.stage != "sft":
        return "an epoch learns 100 % of the targets: texts are cut with one token of overlap"
    options = _tokenizer_settings(recipe)
    folders = [path for path, _ in recipe.data.folders("train")]
    if not all((path / MANIFEST).is_file() for path in folders):
        return "unknown until the token shards are built"
    return str(_loader(recipe, config, load_tokenizer(options.folder)).packing)


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
