"""What a run would begin with, and what it would refuse: looked at before anything is written.

`rorqual train` looks before it makes what is learnt from, so that a run that may not go on costs no
token shards; `--dry-run` looks, reads the text besides, and shows what it found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rorqual.data import Advance, Generator, silent
from rorqual.errors import ConfigError
from rorqual.model import ModelConfig, empty
from rorqual.train.batches import Preparation, TrainingData
from rorqual.train.checkpoint import Standing, find_checkpoint, good_checkpoint, standing
from rorqual.train.checksums import damage
from rorqual.train.interrupt import threads_note
from rorqual.train.lr_schedule import BalanceSettings, MtpSettings, in_tokens
from rorqual.train.prepare import config_of
from rorqual.train.recipe import Recipe
from rorqual.train.start import check_shape
from rorqual.train.tensorboard import require_tensorboard


@dataclass(frozen=True)
class Outlook:
    """The model's shape, what is to be prepared, and the run that would go on, if any."""

    config: ModelConfig
    preparation: Preparation
    standing: Standing | None


@dataclass(frozen=True)
class Preview:
    """What a run would do: (name, value) rows, and lines to read below them."""

    rows: list[tuple[str, str]]
    lines: list[str]


def look_ahead(
    recipe: Recipe,
    run_folder: Path,
    generators: Mapping[str, Generator] | None = None,
    *,
    resume: bool = True,
    allow_changes: bool = False,
    advance: Advance = silent,
) -> Outlook:
    """Checks all that can be known of a run before anything is made; writes nothing.

    ConfigError, DataError, TrainingError as the run itself would raise them, or would when much
    was done already.
    """
    shallow = partial(damage, is_deep=False)  # the run itself looks at every byte
    latest = good_checkpoint(run_folder, shallow).folder if resume else None
    # First without the data: what is amiss there may come from the recipe's change.
    found = standing(latest, recipe, allow_changes=allow_changes) if latest is not None else None
    config = config_of(recipe)
    _check_effect(recipe, config)
    if recipe.metrics.tensorboard:
        require_tensorboard()
    recipe.parallel.check_model(config)
    if found is None and recipe.init_from is not None:
        check_shape(recipe, find_checkpoint(recipe.init_from))
    preparation = recipe.preparation(config, generators or {})
    if latest is not None:
        advance("comparing what is learnt from with what the run was begun with", 0, None, "")
        standing(latest, recipe, inputs=preparation.inputs(), allow_changes=allow_changes)
    preparation.check()
    return Outlook(config, preparation, found)


def preview(
    recipe: Recipe,
    run_folder: Path,
    generators: Mapping[str, Generator] | None = None,
    *,
    resume: bool = True,
    allow_changes: bool = False,
    advance: Advance = silent,
) -> Preview:
    """What a run would do; raises what it would refuse."""
    outlook = look_ahead(
        recipe,
        run_folder,
        generators,
        resume=resume,
        allow_changes=allow_changes,
        advance=advance,
    )
    config = outlook.config
    data = _found(recipe, outlook, allow_changes, advance)
    model = empty(config, device="meta")
    total = recipe.training.total_tokens
    ends = recipe.lr_schedule.phase_ends(total)
    names = ("linear to peak", "constant", "cosine to low", "constant at low")
    rows = [
        ("run folder", str(run_folder)),
        ("begins", _beginning(recipe, run_folder, outlook.standing, resume)),
        ("stage", recipe.stage),
        *([("ranks", recipe.parallel.axes)] if recipe.parallel.world > 1 else []),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("MTP depth", str(config.num_nextn_predict_layers)),
        ("tokens", f"{total:,}"),
        ("batch", f"{recipe.batch_ramp.start} to {recipe.batch_ramp.end} sequences"),
        *[(f"{name} until", f"{end:,} tokens") for name, end in zip(names, ends, strict=True)],
        ("router bias moves until", f"{in_tokens(recipe.balance.bias_until, total):,} tokens"),
        *outlook.preparation.rows(data),
    ]
    lines = outlook.standing.changes if outlook.standing is not None else []
    notes = data.notes if data is not None else ()
    tasks = [] if data is not None else [outlook.preparation.task()]
    return Preview(rows, [*lines, *notes, *threads_note(recipe.training.threads), *tasks])


def _found(
    recipe: Recipe, outlook: Outlook, allow_changes: bool, advance: Advance
) -> TrainingData | None:
    """The data if it is made already."""
    data = outlook.preparation.find(advance)
    if data is not None and outlook.standing is not None:
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
