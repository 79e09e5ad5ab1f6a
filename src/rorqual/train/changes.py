"""What may differ between a run's recipe and the one that it is continued with.

| keys | on a resume |
|---|---|
| `HARMLESS` | may differ: they leave what is learnt as it is, or the data's digest guards them |
| `ON_REQUEST` | refused unless asked for: they move rates, weights and phases from here on |
| all others | refused: they say what the model is, what its moments are, which sample comes next |

A stage names its own keys of the first two kinds itself (`Recipe.harmless`, `Recipe.on_request`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.config import fill
from rorqual.errors import ConfigError, TrainingError, listing
from rorqual.train.lr_schedule import in_tokens
from rorqual.train.recipe import Recipe

# Keys, or sections with a dot at their end. The first that fits decides.
HARMLESS = (
    "name",
    "checkpoint.",
    "validation.",
    "metrics.",
    "ema.",
    "spikes.",
    "training.threads",
    "training.compile",
    "training.activation_checkpointing",
    "tokenizer.folder",
    "parallel.",
)
FIXED = ("optimizer.moments",)
ON_REQUEST = (
    "training.total_tokens",
    "training.micro_batch_size",
    "training.precision",
    "training.deterministic",
    "batch_ramp.",
    "optimizer.",
    "lr_schedule.",
    "balance.",
    "mtp.",
)
REQUEST = "--allow-changes"
FREE, ASKED, NEVER = "free", "asked", "fixed"


@dataclass(frozen=True)
class Change:
    """A key, as `section.key`, with the stored and the new value."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def check_changes(
    stored: dict[str, Any], new: Recipe, tokens: int, *, where: Path, is_asked: bool = False
) -> list[str]:
    """What differs and what it moves, a line each; TrainingError where that may not be."""
    _check_stage(stored, new, where)
    old = _stored_recipe(stored, type(new), where)
    cls = type(new)
    found = [change for change in changes(old, new) if freedom(change.key, cls) != FREE]
    fixed = [change for change in found if freedom(change.key, cls) == NEVER]
    if fixed:
        raise TrainingError(
            f"this run was made with another recipe; different: {listing(fixed)}",
            where=where,
            fix="restore those keys to continue; or start a new run, with init_from if its weights "
            "shall be the beginning, and another --run (or --fresh)",
        )
    if not found:
        return []
    lines = [*map(str, found), *moves(old, new, tokens)]
    if not is_asked:
        raise TrainingError(
            "this recipe changes the rest of the run\n  " + "\n  ".join(lines),
            where=where,
            fix=f"restore those keys, or pass {REQUEST} (in Python allow_changes=True) if it shall "
            "go on so",
        )
    return ["the recipe was changed, and from here on", *(f"  {line}" for line in lines)]


def freedom(key: str, cls: type[Recipe]) -> str:
    """Whether a resume may differ in this key of a stage: FREE, ASKED (`REQUEST`) or NEVER."""
    if _is_among(key, HARMLESS + cls.harmless):
        return FREE
    is_fixed = _is_among(key, FIXED) or not _is_among(key, ON_REQUEST + cls.on_request)
    return NEVER if is_fixed else ASKED


def changes(old: Recipe, new: Recipe) -> list[Change]:
    """All keys whose values differ, sorted."""
    before, after = _flat(old.table()), _flat(new.table())
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def moves(old: Recipe, new: Recipe, tokens: int) -> list[str]:
    """What a change does at `tokens` and to the ends of phases, where old and new differ."""
    now, phases = (
        [
            f"{name} {was} -> {is_now}"
            for (name, was), (_, is_now) in zip(read(old), read(new), strict=True)
            if was != is_now
        ]
        for read in (lambda recipe: _figures(recipe, tokens), _phases)
    )
    lines = [f"at {tokens:,} tokens: {', '.join(now)}"] if now else []
    return lines + [f"{phase} tokens" for phase in phases]


def _figures(recipe: Recipe, tokens: int) -> Iterator[tuple[str, str]]:
    total, micro = recipe.training.total_tokens, recipe.training.micro_batch_size
    yield "learning rate", f"{recipe.lr_schedule.at(tokens, total):.4g}"
    yield "batch", f"{recipe.batch_ramp.at(tokens, total, micro)} sequences"
    yield "MTP weight", f"{recipe.mtp.weight_at(tokens, total):g}"
    yield "router bias speed", f"{recipe.balance.speed_at(tokens, total):g}"


def _phases(recipe: Recipe) -> Iterator[tuple[str, str]]:
    total = recipe.training.total_tokens
    ends = recipe.lr_schedule.phase_ends(total)
    names = ("constant rate", "cosine", "low rate", "final rate")
    later = [
        ("full batch", recipe.batch_ramp.over),
        ("later MTP weight", recipe.mtp.weight_until),
        ("still router bias", recipe.balance.bias_until),
    ]
    places = [*zip(names, ends, strict=True), *((n, in_tokens(a, total)) for n, a in later)]
    for name, place in places:
        yield f"{name} begins at", f"{place:,}"


def _check_stage(stored: dict[str, Any], new: Recipe, where: Path) -> None:
    stage = stored.get("stage", new.stage)
    if stage != new.stage:
        raise TrainingError(
            "this run was made with another recipe, of another stage",
            where=where,
            found=f"a checkpoint of stage {stage!r}, a recipe of stage {new.stage!r}",
            expected="one stage a run",
            fix=f"name another run folder with --run (or --fresh); with init_from = this "
            f"checkpoint, {new.stage!r} begins with its weights",
        )


def _stored_recipe(stored: dict[str, Any], cls: type[Recipe], where: Path) -> Recipe:
    """The recipe in a checkpoint; keys that are newer than it have their defaults."""
    try:
        return fill(cls, stored, where)
    except ConfigError as problem:
        raise TrainingError(
            f"the recipe of this checkpoint cannot be read: {problem.what}",
            where=where,
            expected="a checkpoint of this version",
            fix="start a new run with init_from = this checkpoint",
        ) from None


def _is_among(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == own or (own.endswith(".") and key.startswith(own)) for own in keys)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
