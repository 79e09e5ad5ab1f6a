"""What a run would begin with, and what it would refuse: looked at before anything is written.

`rorqual train` looks before it builds the data, so that a run that may not go on costs no token
shards; `--dry-run` looks, reads the text besides, and shows what it found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rorqual.data import (
    Generator,
    TokenizerSettings,
    find_build,
    find_files,
    inputs_now,
    loaded_tokenizer,
    missing_sources,
    scan_sources,
)
from rorqual.errors import ConfigError
from rorqual.log import console
from rorqual.model import ModelConfig, empty
from rorqual.tokenizer import Tokenizer
from rorqual.train.batches import TrainingData
from rorqual.train.checkpoint import Standing, find_checkpoint, latest_checkpoint, standing
from rorqual.train.lr_schedule import BalanceSettings, MtpSettings, in_tokens
from rorqual.train.notes import threads_note
from rorqual.train.prepare import (
    check_tokenizer,
    config_of,
    open_data,
    tokenizer_settings,
)
from rorqual.train.recipe import Recipe
from rorqual.train.start import check_shape


@dataclass(frozen=True)
class Outlook:
    """The model's shape, the tokenizer if there is one, and the run that would go on, if any."""

    config: ModelConfig
    options: TokenizerSettings
    tokenizer: Tokenizer | None
    standing: Standing | None


def look_ahead(
    recipe: Recipe,
    run_folder: Path,
    generators: Mapping[str, Generator] | None = None,
    *,
    resume: bool = True,
    allow_changes: bool = False,
) -> Outlook:
    """Checks all that can be known of a run before its data is built; writes nothing.

    ConfigError, DataError, TrainingError as the run itself would raise them, or would when much
    was done already.
    """
    latest = latest_checkpoint(run_folder) if resume else None
    # First without the data: what is amiss there may come from the recipe's change.
    found = standing(latest, recipe, allow_changes=allow_changes) if latest is not None else None
    config = config_of(recipe)
    _check_effect(recipe, config)
    if found is None and recipe.init_from is not None:
        check_shape(recipe, find_checkpoint(recipe.init_from))
    options = tokenizer_settings(recipe)
    files = find_files(recipe.data, generators or {})
    if latest is not None:
        with console().status("comparing the text with what the run was begun with"):
            inputs = inputs_now(recipe.data, options, files)
        standing(latest, recipe, inputs=inputs, allow_changes=allow_changes)
    tokenizer = loaded_tokenizer(options.path) if options.path.exists() else None
    if tokenizer is not None:
        check_tokenizer(recipe, config, tokenizer)
    return Outlook(config, options, tokenizer, found)


def show_plan(
    recipe: Recipe,
    run_folder: Path,
    generators: Mapping[str, Generator] | None = None,
    *,
    resume: bool = True,
    allow_changes: bool = False,
) -> None:
    """Prints what a run would do; raises what it would refuse."""
    from rich.table import Table

    outlook = look_ahead(recipe, run_folder, generators, resume=resume, allow_changes=allow_changes)
    config = outlook.config
    missing = missing_sources(recipe.data)
    data = None if missing else _built(recipe, outlook, generators or {}, allow_changes)
    model = empty(config, device="meta")
    total = recipe.training.total_tokens
    ends = recipe.lr_schedule.phase_ends(total)
    names = ("linear to peak", "constant", "cosine to low", "constant at low")
    rows = [
        ("run folder", str(run_folder)),
        ("begins", _beginning(recipe, run_folder, outlook.standing, resume)),
        ("stage", recipe.stage),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("MTP depth", str(config.num_nextn_predict_layers)),
        ("tokens", f"{total:,}"),
        ("batch", f"{recipe.batch_ramp.start} to {recipe.batch_ramp.end} sequences"),
        *[(f"{name} until", f"{end:,} tokens") for name, end in zip(names, ends, strict=True)],
        ("router bias moves until", f"{in_tokens(recipe.balance.bias_until, total):,} tokens"),
        ("sources", ", ".join(source.label for source in recipe.data.sources)),
        ("sources to fetch", ", ".join(missing) or "none"),
        ("targets", _learnt(recipe, data)),
    ]
    table = Table(box=None, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console().print(table)
    changes = outlook.standing.changes if outlook.standing is not None else []
    notes = data.notes if data is not None else (*threads_note(recipe), _unbuilt(outlook))
    for line in (*changes, *notes):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


def _built(
    recipe: Recipe, outlook: Outlook, generators: Mapping[str, Generator], allow_changes: bool
) -> TrainingData | None:
    """The data if it is built; otherwise None, and all text was read to see that it can be."""
    summary = find_build(recipe.data, outlook.options, generators)
    if summary is None:
        scan_sources(recipe.data, generators)
        return None
    data = open_data(recipe, outlook.config, summary)
    if outlook.standing is not None:
        where = outlook.standing.folder
        standing(where, recipe, inputs=data.inputs, digest=data.digest, allow_changes=allow_changes)
    return data


def _beginning(recipe: Recipe, run_folder: Path, found: Standing | None, resume: bool) -> str:
    if found is not None:
        done, total = found.progress.tokens, recipe.training.total_tokens
        if done >= total:
            return f"nothing: {found.folder} has {done:,} tokens already"
        return f"by continuing {found.folder} at {done:,} tokens"
    start = f"with the weights of {recipe.init_from}" if recipe.init_from else "with a fresh model"
    is_aside = not resume and run_folder.exists()
    return f"{start}; what lies in the run folder is set aside" if is_aside else start


def _unbuilt(outlook: Outlook) -> str:
    if outlook.tokenizer is not None:
        return f"the token shards are to be built with the tokenizer {outlook.options.folder}"
    return (
        f"a tokenizer of at most {outlook.options.vocab_size:,} ids is to be trained into "
        f"{outlook.options.folder}, then the token shards are built"
    )


def _learnt(recipe: Recipe, data: TrainingData | None) -> str:
    """What an epoch learns, of the token shards as they are."""
    if recipe.stage != "sft":
        return "an epoch learns 100 % of the targets: texts are cut with one token of overlap"
    return str(data.packing) if data is not None else "unknown until the token shards are built"


def _check_effect(recipe: Recipe, config: ModelConfig) -> None:
    """ConfigError for sections that say something of what the model has not."""
    has_experts = any(map(config.is_moe_layer, range(config.num_layers_with_mtp)))
    weights = (recipe.mtp.weight, recipe.mtp.weight_after)
    sections = [
        (
            "mtp",
            not config.num_nextn_predict_layers and any(weights) and recipe.mtp != MtpSettings(),
            "no MTP module: model.num_nextn_predict_layers is 0",
        ),
        (
            "balance",
            not has_experts and recipe.balance != BalanceSettings(),
            "no experts: model.first_k_dense_replace is num_hidden_layers",
        ),
    ]
    for name, is_idle, reason in sections:
        if is_idle:
            raise ConfigError(
                f"[{name}] has no effect: the model has {reason}",
                fix=f"remove [{name}], or give the model what it speaks of in [model]",
            )
