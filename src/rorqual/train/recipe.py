"""A recipe: everything that decides a training run, as one TOML file.

`Recipe` is what the recipes of all stages have in common, and what the loop asks of a stage. A
stage is a subclass beside its code, with sections of its own; the verb knows which stages there
are, and gives their classes to `load_recipe`. `train.keys` makes docs/recipes.md, which has every
key, of what stands below the fields.

Points of time (`over`, `warmup`, `..._until`) are shares of total_tokens (0.0 to 1.0) or whole
numbers of tokens. A key that would do nothing in the chosen stage is an error. All sections but
[training] and [batch_ramp], and those that the stage needs, may be left out; the defaults are the
report's (§4.2), with its durations as shares of 14.8T tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from rorqual.bundled import checkpoint_path
from rorqual.config import apply_overrides, fill, has_key, read_toml, settings, with_set
from rorqual.data import Generator, TokenizerSettings
from rorqual.errors import ConfigError, UsageError, listing
from rorqual.model import DeepseekV3, ModelConfig, preset
from rorqual.parallel.settings import ParallelSettings
from rorqual.train.batches import Batches, Preparation, TrainingData
from rorqual.train.ema import EmaSettings
from rorqual.train.loss import TrainingModel
from rorqual.train.lr_schedule import BalanceSettings, BatchRamp, LrSchedule, MtpSettings
from rorqual.train.metrics import MetricsSettings
from rorqual.train.optimizer import OptimizerSettings
from rorqual.train.recompute import Recompute
from rorqual.train.spikes import SpikeSettings

ALL_KEYS = "`rorqual train --keys`"


@settings
class TrainingSettings:
    """Size and form of the computation; `total_tokens` counts the main model's inputs."""

    total_tokens: int = Field(gt=0)
    """Length of the run in inputs of the main model: sequences times `sequence_length`, padding of
    packed conversations included. The last batch may end a little beyond it."""
    sequence_length: int = Field(gt=0)
    """Inputs of a sample; at most `model.max_position_embeddings`."""
    micro_batch_size: int = Field(gt=0)
    """Sequences of one forward and backward pass: memory and speed, not the result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: matrix products in bfloat16, all else and the weights in float32."""
    compile: bool = False
    """torch.compile: slower to start, faster steps."""
    activation_checkpointing: Recompute = "none"
    """What is computed again in the backward pass instead of kept: `norms`, the report's choice
    (§3.2.3), RMSNorm and MLA's up-projections; `layers`, all within a layer: the least memory, one
    more forward pass. `true` and `false` stand for `layers` and `none`. On a CPU the operators of
    `none` keep less than those of `norms`."""
    threads: int | None = Field(default=None, gt=0, le=1024)  # torch crashes on far too many
    """torch's threads; left out: torch's choice."""
    deterministic: bool | None = None
    """The same bits in each run of this recipe on the same machine, threads and ranks; left out: on
    a CPU yes, where it costs nothing, on a GPU no."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return {True: "layers", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> TrainingSettings:
        if self.compile and self.activation_checkpointing == "norms":
            raise ValueError(
                "activation_checkpointing 'norms' with compile: torch.compile itself chooses what "
                "it computes again; take 'none' or 'layers', or leave compile out"
            )
        return self


@settings
class ValidationSettings:
    """Measurements on what is held out: how often, and on how many tokens."""

    every_tokens: int | None = Field(default=None, gt=0)
    """How often held-out text is measured; left out: only at the end."""
    max_tokens: int = Field(default=200_000, gt=0)
    """On how many of its tokens, at most."""


@settings
class CheckpointSettings:
    """When to save, and how many checkpoints stay; the last step is saved always."""

    every_tokens: int | None = Field(default=None, gt=0)
    """How often to save, by tokens; left out: not by tokens."""
    every_minutes: float | None = Field(default=10.0, gt=0)
    """How often to save, by time. The last step is always saved."""
    keep_last: int = Field(default=2, gt=0)
    """How many checkpoints stay; each takes about 12 bytes a parameter."""


@settings
class Recipe:
    """A training run: what all stages share; see the file's head for each section.

    A stage is a subclass with `stage: Literal["its name"] = "its name"` and its own sections. It
    says how what it learns from is made (`preparation`), and overrides what else is its own.
    """

    needs_checkpoint: ClassVar[bool] = False
    """Whether it must start from the weights of `init_from`."""
    harmless: ClassVar[tuple[str, ...]] = ()
    """Of its own keys those that may differ on a resume (`changes.py`)."""
    on_request: ClassVar[tuple[str, ...]] = ()
    """And those that may where it is asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits, `.`, `_`, `-`; the run folder is `runs/NAME`."""
    stage: str
    """What is learnt: with `pretrain` all tokens, with `sft` what the assistant says."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the fresh model and of the order of samples."""
    init_from: str | None = None
    """Start from these weights: a checkpoint folder, a run folder (its latest checkpoint), or
    `tiny`. `sft` needs it."""
    model: dict[str, Any] = field(default_factory=dict)
    """A preset's shape, with changes. With `init_from`: changes of the checkpoint's settings, never
    of the sizes of its tensors."""
    tokenizer: TokenizerSettings | None = None
    """Which tokenizer; left out with `init_from`: the checkpoint's."""
    training: TrainingSettings
    """Size and form of the computation."""
    batch_ramp: BatchRamp
    """Sequences a step, growing at the beginning of the run (§4.2)."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW (§4.2)."""
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    """Learning rate: up to `peak`, there, down a cosine to `low`, there, then `final` (§4.2)."""
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    """Balance of the experts without an auxiliary loss, and its small complement (§2.1.2)."""
    mtp: MtpSettings = field(default_factory=MtpSettings)
    """Multi-token prediction's loss (§2.2); its depth is `model.num_nextn_predict_layers`, and with
    depth 0 a section [mtp] is an error."""
    ema: EmaSettings = field(default_factory=EmaSettings)
    """An average of the parameters over the last steps, in CPU memory (§3.2.3)."""
    spikes: SpikeSettings = field(default_factory=SpikeSettings)
    """Jumps of the loss or of the gradient's norm, and steps that are not finite: the run goes back
    to its last checkpoint and leaves the batch out ([runs.md](runs.md#jumps))."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """Measurements on held-out text: bits a byte."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """When to save."""
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    """What is written of the run (docs/runs.md)."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """How many ranks share the run, and along which axes (docs/parallel.md)."""

    def preparation(self, config: ModelConfig, generators: Mapping[str, Generator]) -> Preparation:
        """What is to be done before the first step; `generators` make text, by their names."""
        raise NotImplementedError(f"stage {self.stage!r} does not say what it learns from")

    def batches(self, data: TrainingData, model: DeepseekV3) -> Batches:
        """Where the samples come from; a stage may make them with the very model that it trains."""
        return data.train

    def root(self, model: DeepseekV3) -> nn.Module:
        """What is learnt: the module that gives a micro-batch's loss, called as `TrainingModel` is.

        By name it gets what `Batch.extras` holds besides. The names of its own figures are in
        `metric_names`; their values, shares of the batch's, in `LossParts.metrics_M`.
        """
        return TrainingModel(model)

    @property
    def is_isolated(self) -> bool:
        """Whether packed documents do not see each other, so that batches number them."""
        return False

    def folders_read(self) -> dict[str, Path]:
        """The folders that the run reads, by the key that names them."""
        found = {}
        if self.init_from is not None:
            found["init_from"] = checkpoint_path(self.init_from)
        if self.tokenizer is not None:
            found["tokenizer.folder"] = self.tokenizer.path
        return found

    def held_out_folders(self) -> list[Path]:
        """The folders of token shards that hold real text of which a part is held out."""
        return []

    def missing_sources(self) -> list[str]:
        """The sources that are to be fetched first."""
        return []

    def idle_keys(self, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(key, why) of what `table` sets and would do nothing."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self._check_start()
        micro = self.training.micro_batch_size
        for key in ("start", "end", "multiple_of"):
            size = getattr(self.batch_ramp, key)
            if size is not None and size % micro:
                raise ValueError(
                    f"batch_ramp.{key} {size} is not a multiple of "
                    f"training.micro_batch_size {micro}"
                )
        self._check_ranks()
        total = self.training.total_tokens
        ends = self.lr_schedule.phase_ends(total)
        if list(ends) != sorted(ends):
            raise ValueError(
                "lr_schedule's phases overlap: warmup, constant_until, cosine_until, low_until "
                f"are {ends} tokens of training.total_tokens {total}"
            )
        length, start = self.training.sequence_length, self.batch_ramp.start
        if total < start * length:
            raise ValueError(
                f"training.total_tokens {total} is less than one batch: batch_ramp.start {start} "
                f"times training.sequence_length {length} is {start * length}"
            )
        return self

    def _check_ranks(self) -> None:
        """Every batch can be divided among the ranks that take samples."""
        ramp, num_replicas = self.batch_ramp, self.parallel.num_replicas
        key, unit = "start", ramp.start
        if ramp.start != ramp.end:
            key, unit = "multiple_of", ramp.multiple_of or self.training.micro_batch_size
        if unit % num_replicas:
            raise ValueError(
                f"batch_ramp.{key} {unit} is not a multiple of the {num_replicas} ranks that take "
                f"samples ([parallel] {self.parallel.axes})"
            )
        for size in (ramp.start, ramp.end):
            try:
                self.parallel.check_batch(size // num_replicas // self.training.micro_batch_size)
            except UsageError as problem:
                raise ValueError(
                    f"[parallel] order = {self.parallel.order!r}: {problem.what}: {problem.found}, "
                    f"where it takes {problem.expected} (batches of {size} sequences)"
                ) from None
        if self.training.compile and self.parallel.world > 1:
            raise ValueError("training.compile is for one rank, and [parallel] asks for more")

    def _check_start(self) -> None:
        if self.init_from is None and "preset" not in self.model:
            raise ValueError("model.preset is missing; name a preset, or a checkpoint in init_from")
        if self.init_from is not None and "preset" in self.model:
            raise ValueError("model.preset and init_from exclude each other")
        if self.needs_checkpoint and self.init_from is None:
            raise ValueError(f"stage {self.stage!r} needs init_from, the checkpoint to start from")

    def model_config(self, base: ModelConfig | None = None) -> ModelConfig:
        """The preset (or `base`, the checkpoint's) with the changes of [model]; ConfigError."""
        changes = dict(self.model)
        name = changes.pop("preset", None)
        if base is None:
            base = preset(str(name))
        config = fill(ModelConfig, {**asdict(base), **changes}, where="[model]")
        if self.training.sequence_length > config.max_position_embeddings:
            raise ConfigError(
                "training.sequence_length exceeds model.max_position_embeddings",
                found=self.training.sequence_length,
                expected=f"at most {config.max_position_embeddings}",
                fix="lower training.sequence_length, or raise model.max_position_embeddings",
            )
        return config

    def table(self) -> dict[str, Any]:
        """The recipe as plain values, defaults filled in; its own sections before [training]."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        common = [part.name for part in fields(Recipe)]
        place = common.index("training")
        own = [name for name in table if name not in common]
        return {name: table[name] for name in (*common[:place], *own, *common[place:])}


Stages = Sequence[type[Recipe]]


def load_recipe(
    path: str | os.PathLike[str], stages: Stages, overrides: Sequence[str] = ()
) -> Recipe:
    """Reads and checks a recipe, its model shape included; keys that would do nothing are errors.

    `stages` are those that it may be of; one that names none is of the first. Of a recipe that a
    run wrote all keys are there: those with their defaults are no fault.
    """
    table = apply_overrides(read_toml(path), overrides)
    recipe = recipe_of(table, stages, path, overrides)
    idle = dict(recipe.idle_keys(table))
    if idle:
        raise ConfigError(
            "; ".join(f"{key} has no effect: {why}" for key, why in idle.items()),
            where=with_set(path, overrides),
            fix=f"remove {listing(list(idle))}, or change what is in its way",
        )
    if recipe.init_from is None:
        try:
            recipe.model_config()
        except ConfigError as problem:
            raise problem.with_(
                where=f"{with_set(path, overrides)} [model]",
                fix=problem.fix or "correct the keys of [model]",
            ) from None
    return recipe


def recipe_of(
    table: dict[str, Any], stages: Stages, where: object = None, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe of a table: the class of its stage, filled; ConfigError names each fault."""
    cls = _stage_of(table, stages, where, overrides)
    try:
        return fill(cls, table, where, overrides=overrides, explain=_owner(cls, stages))
    except ConfigError as problem:
        raise problem.with_(fix=f"{problem.fix} (every key: {ALL_KEYS})") from None


def _stage_of(
    table: dict[str, Any], stages: Stages, where: object, overrides: Sequence[str]
) -> type[Recipe]:
    known = {cls.stage: cls for cls in stages}
    name = table.get("stage", stages[0].stage)
    if isinstance(name, str) and name in known:
        return known[name]
    raise ConfigError(
        f"stage: should be {' or '.join(map(repr, known))} (found {name!r})",
        where=with_set(where, overrides, ["stage"]) if overrides else where,
        fix="name a stage that this command knows",
    )


def _owner(cls: type[Recipe], stages: Stages) -> Callable[[Sequence[Any]], str | None]:
    """Says of a key that `cls` does not know which stage it is of."""

    def owner(path: Sequence[Any]) -> str | None:
        owners = [repr(stage.stage) for stage in stages if has_key(stage, path)]
        if not owners:
            return None
        return f"it is of stage {' or '.join(owners)}, and this recipe is of {cls.stage!r}"

    return owner


def toml_text(table: dict[str, Any]) -> str:
    """A table of `Recipe.table` as TOML; None is left out, since TOML has no such value."""
    plain = [f"{key} = {_toml(value)}" for key, value in table.items() if _is_value(value)]
    sections = [
        f"\n[{key}]\n" + "\n".join(f"{k} = {_toml(v)}" for k, v in part.items() if v is not None)
        for key, part in table.items()
        if isinstance(part, dict)
    ]
    return "\n".join([*plain, *sections]) + "\n"


def _is_value(value: object) -> bool:
    return value is not None and not isinstance(value, dict)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
