"""Lines to read before the first step: where a run on corpora differs from what its recipe
suggests.
"""

from __future__ import annotations

from collections.abc import Iterator

from rorqual.data import BuildSummary, DataSettings, Loader, TokenizerSettings
from rorqual.model import ModelConfig
from rorqual.tokenizer import Tokenizer
from rorqual.train.batches import TrainingData
from rorqual.train.recipe import Recipe


def corpora_notes(
    recipe: Recipe,
    data: DataSettings,
    config: ModelConfig,
    options: TokenizerSettings,
    summary: BuildSummary,
    loader: Loader,
    opened: TrainingData,
) -> Iterator[str]:
    """The lines, in order of reading."""
    tokenizer = opened.tokenizer
    assert tokenizer is not None, "corpora are tokens of some tokenizer"
    if recipe.tokenizer is not None:
        yield _tokenizer_note(options, tokenizer, summary.has_trained_tokenizer)
    if config.vocab_size > (ids := tokenizer.vocab_size):
        yield (
            f"the model has {config.vocab_size:,} rows for the tokenizer's {ids:,} ids: "
            f"{config.vocab_size - ids:,} are never used (model.vocab_size decides)"
        )
    yield _passes_note(recipe, data, loader)
    if opened.held_out is None:
        documents = summary.total("num_documents", "held_out")
        yield "no validation: " + (
            f"none of the {documents:,} held-out documents fits a sample with a target"
            if documents
            else "nothing is held out (data.held_out, or held_out of a source)"
        )
    yield from _unused_rates(data, summary.has_texts)


def _tokenizer_note(options: TokenizerSettings, tokenizer: Tokenizer, is_new: bool) -> str:
    ids = tokenizer.vocab_size
    text = f"tokenizer {options.folder}: {ids:,} ids"
    if is_new:
        short = f" of the {options.vocab_size:,} asked for, the text gave no more"
        return text + (short if ids < options.vocab_size else "") + "; trained now"
    default = TokenizerSettings(folder=options.folder)
    idle = []
    if options.vocab_size not in (ids, default.vocab_size):
        idle.append(f"vocab_size = {options.vocab_size}")
    if not options.merge_digits and _merges_digits(tokenizer):
        idle.append("merge_digits = false")
    if not idle:
        return text
    return f"{text}; it was there already, so [tokenizer] {', '.join(idle)} does not count"


def _merges_digits(tokenizer: Tokenizer) -> bool:
    texts = (tokenizer.bytes_of_text(token_id) for token_id in range(tokenizer.vocab_size))
    return any(len(text) > 1 and text.isdigit() for text in texts)


def _passes_note(recipe: Recipe, data: DataSettings, loader: Loader) -> str:
    samples = recipe.training.total_tokens / recipe.training.sequence_length
    passes = samples / loader.samples_per_pass
    taken = zip(data.sources, loader.num_taken, loader.streams, strict=True)
    seen = [
        f"{source.label} {_count(passes * number / stream.num_samples)}"
        for source, number, stream in taken
        if number
    ]
    return f"passes over each source: {', '.join(seen)}"


def _count(passes: float) -> str:
    """Three significant digits, without an exponent."""
    return (
        f"{passes:,.0f}" if passes >= 999.5 else f"{passes:.3g}" if passes >= 1e-4 else "< 0.0001"
    )


def _unused_rates(data: DataSettings, has_texts: bool | None) -> Iterator[str]:
    default = DataSettings(folder=data.folder, sources=data.sources)
    for key in ("fim_rate", "split_punctuation_rate"):
        value = getattr(data, key)
        if has_texts is False and value and value != getattr(default, key):
            yield f"data.{key} = {value} has no effect: it is of texts, all here are conversations"
