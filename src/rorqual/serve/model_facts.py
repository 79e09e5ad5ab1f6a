"""What a server tells people of its model: its shape, how its weights run, what it is good for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rorqual.engine import Engine
from rorqual.model.flops import count_parameters
from rorqual.model.served import Served

LIMITS = (
    "It is a demonstration of {parameters} parameters that sees {context} tokens at a time. It "
    "knows little beyond this, is often wrong, and writes no essays, long programs or translations."
)
"""Of the bundled model: what its chat card does not say (docs/tiny.md)."""


@dataclass(frozen=True)
class ModelFacts:
    """`table` are names and values to be read; `opening` and `examples` are the chat card's."""

    table: tuple[tuple[str, str], ...] = ()
    opening: str | None = None
    examples: tuple[str, ...] = ()
    limits: str | None = None


def model_facts(
    engine: Engine,
    opening: str | None = None,
    examples: tuple[str, ...] = (),
    *,
    is_bundled: bool = False,
) -> ModelFacts:
    config, stats = engine.model.config, engine.stats()
    count = count_parameters(config)
    experts = (
        f"{config.num_experts_per_tok} of {config.n_routed_experts} routed, "
        f"{config.n_shared_experts or 0} shared"
    )
    forms: Counter[tuple[str, str]] = Counter()
    for part in engine.model.modules():
        if isinstance(part, Served):
            forms[part.storage()[0], part.kernels.name] += 1
    cached = stats.num_blocks * engine.options.block_tokens
    num_drafts = engine.options.speculate
    table = {
        "Parameters": f"{_short(count.total)}, {_short(count.activated)} of them for each token"
        + (f"; {_short(count.mtp)} to draft with" if count.mtp else ""),
        "Context": f"{engine.max_positions:,} tokens",
        "Layers": f"{config.num_hidden_layers}, hidden size {config.hidden_size:,}",
        "Experts": experts,
        "Vocabulary": f"{config.vocab_size:,} tokens",
        "Weights": ", ".join(f"{number} parts {form}" for form, number in _by(forms, 0)),
        "Kernels": ", ".join(f"{name} for {number} parts" for name, number in _by(forms, 1)),
        "Device": str(engine.device),
        "Cache": f"{cached:,} tokens, {engine.options.kv_cache_dtype}",
        "Drafts": f"at most {num_drafts} tokens ahead" if num_drafts else "none",
    }
    limits = LIMITS.format(parameters=_short(count.total), context=engine.max_positions)
    return ModelFacts(tuple(table.items()), opening, examples, limits if is_bundled else None)


def _by(forms: Counter[tuple[str, str]], index: int) -> list[tuple[str, int]]:
    counted: Counter[str] = Counter()
    for key, number in forms.items():
        counted[key[index]] += number
    return counted.most_common()


def _short(number: int) -> str:
    """9.0M, 671B."""
    for unit, letter in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            value = number / unit
            return f"{value:.1f}{letter}" if value < 100 else f"{value:.0f}{letter}"
    return f"{number:,}"
