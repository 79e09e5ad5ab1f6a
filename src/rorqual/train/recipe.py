"""A recipe: everything that decides a training run, as one TOML file.

```toml
name = "tiny"
stage = "pretrain"              # or "sft": only the assistant's tokens are targets
seed = 0
# init_from = "runs/tiny/checkpoints/latest"   # start from these weights

[model]                         # a preset and changes of any ModelConfig field
preset = "tiny"                 # left out with init_from: then changes apply to the checkpoint's
vocab_size = 4096

[tokenizer]                     # rorqual.data.TokenizerSettings; folder = "tiny" is the bundled one
[data]                          # rorqual.data.DataSettings

[training]
total_tokens = 60_000_000       # inputs of the main model: sequences * sequence_length
sequence_length = 256
micro_batch_size = 8            # sequences of one forward and backward pass
precision = "float32"           # or "bfloat16": of matrix products
compile = false
activation_checkpointing = false
threads = 2                     # left out: PyTorch's choice
isolate_documents = false       # packed documents do not see each other; "sft": left out or true
long_conversations = "split"    # sft: what does not fit a sample; or "refuse": an error

[batch_ramp]                    # sequences a step; multiples of micro_batch_size
start = 16
end = 64
over = 0.1

[optimizer]
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
eps = 1e-8
clip_norm = 1.0
moments = "float32"             # or "bfloat16"

[lr_schedule]                   # linear, constant, cosine, constant, constant
peak = 2e-3
low = 2e-4
final = 7e-5
warmup = 0.01
constant_until = 0.676
cosine_until = 0.966
low_until = 0.989

[balance]
bias_update_speed = 0.001
bias_until = 0.966
sequence_alpha = 1e-4

[mtp]                           # the depth is [model] num_nextn_predict_layers
weight = 0.3
weight_until = 0.676
weight_after = 0.1

[validation]
every_tokens = 5_000_000        # left out: only at the end
max_tokens = 200_000

[checkpoint]
every_tokens = 5_000_000        # left out: none by tokens
every_minutes = 10              # left out: none by time
keep_last = 2
```

Points of time (`over`, `warmup`, `..._until`) are shares of total_tokens (0.0 to 1.0) or whole
numbers of tokens. A key that would do nothing in the chosen stage is an error. All sections but
[training], [batch_ramp] and [data] may be left out; the defaults are the report's (§4.2), with its
durations as shares of 14.8T tokens. docs/training.md has every key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field
from typing import Any, Literal

from pydantic import Field, model_validator

from rorqual.config import apply_overrides, fill, read_toml, settings, with_set
from rorqual.data import DataSettings, TokenizerSettings
from rorqual.errors import ConfigError, listing
from rorqual.model import ModelConfig, preset
from rorqual.train.lr_schedule import BalanceSettings, BatchRamp, LrSchedule, MtpSettings
from rorqual.train.optimizer import OptimizerSettings


@settings
class TrainingSettings:
    """Size and form of the computation; `total_tokens` counts the main model's inputs."""

    total_tokens: int = Field(gt=0)
    sequence_length: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    threads: int | None = Field(default=None, gt=0, le=1024)  # torch crashes on far too many
    isolate_documents: bool = False
    long_conversations: Literal["split", "refuse"] = "split"


@settings
class ValidationSettings:
    """Bits per byte on held-out data: how often, and on how many tokens."""

    every_tokens: int | None = Field(default=None, gt=0)
    max_tokens: int = Field(default=200_000, gt=0)


@settings
class CheckpointSettings:
    """When to save, and how many checkpoints stay; the last step is saved always."""

    every_tokens: int | None = Field(default=None, gt=0)
    every_minutes: float | None = Field(default=10.0, gt=0)
    keep_last: int = Field(default=2, gt=0)


@settings
class Recipe:
    """A training run; see the file's head for each section."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    stage: Literal["pretrain", "sft"] = "pretrain"
    seed: int = Field(default=0, ge=0, lt=2**63)
    init_from: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerSettings | None = None
    data: DataSettings
    training: TrainingSettings
    batch_ramp: BatchRamp
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    mtp: MtpSettings = field(default_factory=MtpSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self._check_start()
        micro = self.training.micro_batch_size
        for key in ("start", "end"):
            size = getattr(self.batch_ramp, key)
            if size % micro:
                raise ValueError(
                    f"batch_ramp.{key} {size} is not a multiple of "
                    f"training.micro_batch_size {micro}"
                )
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

    def _check_start(self) -> None:
        if self.init_from is None and "preset" not in self.model:
            raise ValueError("model.preset is missing; name a preset, or a checkpoint in init_from")
        if self.init_from is not None and "preset" in self.model:
            raise ValueError("model.preset and init_from exclude each other")
        if self.stage == "sft" and self.init_from is None:
            raise ValueError("stage 'sft' needs init_from, the checkpoint to start from")

    @property
    def is_isolated(self) -> bool:
        """Whether packed documents do not see each other: §5.1 for "sft"; §4.1 has it not."""
        return self.stage == "sft" or self.training.isolate_documents

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
        """The recipe as plain values, defaults filled in."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        table["training"]["isolate_documents"] = self.is_isolated
        return table

    @property
    def digest(self) -> str:
        """A hash of the whole recipe."""
        return hashlib.sha256(json.dumps(self.table(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe, its model shape included; keys that would do nothing are errors.

    Of a recipe that a run wrote all keys are there: those with their defaults are no fault.
    """
    table = apply_overrides(read_toml(path), overrides)
    recipe = fill(Recipe, table, path, overrides=overrides)
    idle = dict(_without_effect(table, recipe))
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


def _without_effect(table: dict[str, Any], recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, why) of what is set and would do nothing."""
    is_sft, training = recipe.stage == "sft", table["training"]
    if is_sft and training.get("isolate_documents") is False:
        yield "training.isolate_documents", "stage 'sft' always isolates documents"
    if not is_sft and recipe.training.long_conversations != "split":
        yield "training.long_conversations", "stage 'pretrain' cuts all text at fixed places"
    if not any(recipe.data.held_out_share(source) for source in recipe.data.sources):
        for key in ("every_tokens", "max_tokens"):
            if getattr(recipe.validation, key) != getattr(ValidationSettings(), key):
                yield f"validation.{key}", "nothing is held out (data.held_out, or a source's)"
    for source in recipe.data.sources:
        if source.licence is not None and source.is_packaged:
            yield f"licence of {source.label}", "its packages state it"


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
