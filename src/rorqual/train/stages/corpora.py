"""What stages that learn from corpora share: [data], token shards, loaders, what is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from rorqual.config import settings
from rorqual.data import (
    Advance,
    BuildSummary,
    DataSettings,
    Generator,
    Inputs,
    Isolation,
    Loader,
    build,
    find_build,
    find_files,
    inputs_now,
    loaded_tokenizer,
    missing_sources,
    num_samples,
    scan_sources,
    silent,
)
from rorqual.model import ModelConfig
from rorqual.tokenizer import Tokenizer
from rorqual.train.batches import Preparation, TrainingData
from rorqual.train.prepare import check_tokenizer, tokenizer_settings
from rorqual.train.recipe import Recipe, TrainingSettings, ValidationSettings
from rorqual.train.stages.corpora_notes import corpora_notes
from rorqual.train.validation import HeldOutText, bytes_of_ids

# Changes whenever the same shards would be packed otherwise: a resume must not mix two packings.
PACKING_FORM = "packed whole, 1"


@settings
class CorporaTraining(TrainingSettings):
    """[training] of these stages: besides, how documents become samples."""

    # Choice: both stages have both keys, though each uses only one: so stored recipes still load.
    isolate_documents: bool = False
    """Documents in one sample do not see each other; in `sft` they never do."""
    long_conversations: Literal["split", "refuse"] = "split"
    """`sft`: a conversation that does not fit a sample is split between turns, its system message
    repeated, or is an error."""


@settings
class CorporaStage(Recipe):
    """A stage that learns from the token shards of [data]."""

    packs_whole: ClassVar[bool] = False
    """Whether a sample holds whole documents; otherwise texts are cut at fixed places."""
    harmless: ClassVar[tuple[str, ...]] = ("data.folder", "data.corpora")  # the digest guards them
    on_request: ClassVar[tuple[str, ...]] = ("training.isolate_documents",)

    data: DataSettings
    """Where the text comes from and the token shards go; of the stages that learn from corpora, as
    both are."""
    training: CorporaTraining

    def preparation(self, config: ModelConfig, generators: Mapping[str, Generator]) -> Preparation:
        return Corpora(self, config, generators)

    def isolation(self, tokenizer: Tokenizer) -> Isolation | None:
        """How documents are kept apart: not at all, packed whole, or where texts are cut."""
        if not self.is_isolated:
            return None
        return Isolation(
            begin_id=tokenizer.bos_id,
            user_id=tokenizer.user_id,
            assistant_id=tokenizer.assistant_id,
            is_whole=self.packs_whole,
            splits_long=self.training.long_conversations == "split",
        )

    def folders_read(self) -> dict[str, Path]:
        own = {"data.folder": Path(self.data.folder), "data.corpora": Path(self.data.corpora)}
        return own | super().folders_read()

    def held_out_folders(self) -> list[Path]:
        root = Path(self.data.folder)
        return [root / source.label for source in self.data.sources if not source.is_generated]

    def missing_sources(self) -> list[str]:
        return missing_sources(self.data)

    def idle_keys(self, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if not any(self.data.held_out_share(source) for source in self.data.sources):
            for key in ("every_tokens", "max_tokens"):
                if getattr(self.validation, key) != getattr(ValidationSettings(), key):
                    yield f"validation.{key}", "nothing is held out (data.held_out, or a source's)"
        for source in self.data.sources:
            if source.licence is not None and source.is_packaged:
                yield f"licence of {source.label}", "its packages state it"

    def table(self) -> dict[str, Any]:
        table = super().table()
        table["training"]["isolate_documents"] = self.is_isolated
        return table


class Corpora:
    """The preparation of token shards: `Preparation` with the files of all sources."""

    def __init__(
        self, recipe: CorporaStage, config: ModelConfig, generators: Mapping[str, Generator]
    ) -> None:
        self.recipe, self.config, self.generators = recipe, config, generators
        self.options = tokenizer_settings(recipe)
        self.text: tuple[int, int] | None = None  # documents and bytes, where `find` has read them

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        return find_files(self.recipe.data, self.generators)

    def inputs(self) -> Inputs:
        return inputs_now(self.recipe.data, self.options, self.files)

    def check(self) -> None:
        """Checks that a tokenizer which is there fits the model."""
        assert self.files is not None, "what cannot be found has raised"
        if self.options.path.exists():
            check_tokenizer(self.recipe, self.config, loaded_tokenizer(self.options.path))

    def find(self, advance: Advance = silent) -> TrainingData | None:
        data = self.recipe.data
        if missing_sources(data):
            return None
        summary = find_build(data, self.options, self.generators)
        if summary is None:
            self.text = scan_sources(data, self.generators, advance)
            return None
        return self._open(summary)

    def make(self, advance: Advance = silent) -> TrainingData:
        data = self.recipe.data
        return self._open(build(data, self.options, self.generators, advance=advance))

    def rows(self, data: TrainingData | None) -> list[tuple[str, str]]:
        recipe = self.recipe
        learnt = "an epoch learns 100 % of the targets: texts are cut with one token of overlap"
        if recipe.packs_whole:
            learnt = "unknown until the token shards are built"
        if data is not None and data.learnt is not None:
            learnt = data.learnt
        text = []
        if self.text is not None and self.text[0]:
            num_documents, num_bytes = self.text
            text = [("text", f"{num_bytes:,} bytes in {num_documents:,} documents or blocks")]
        return [
            ("sources", ", ".join(source.label for source in recipe.data.sources)),
            *text,
            ("sources to fetch", ", ".join(recipe.missing_sources()) or "none"),
            ("targets", learnt),
        ]

    def task(self) -> str:
        folder = self.options.folder
        if self.options.path.exists():
            return f"the token shards are to be built with the tokenizer {folder}"
        return (
            f"a tokenizer of at most {self.options.vocab_size:,} ids is to be trained into "
            f"{folder}, then the token shards are built"
        )

    def _open(self, summary: BuildSummary) -> TrainingData:
        """The loaders of a build that is whole; TrainingError if its tokenizer fits no model."""
        recipe = self.recipe
        tokenizer = loaded_tokenizer(self.options.path)
        check_tokenizer(recipe, self.config, tokenizer)
        loader = Loader(
            recipe.data.folders("train"),
            recipe.training.sequence_length,
            self.config.num_nextn_predict_layers,
            seed=recipe.seed,
            isolation=recipe.isolation(tokenizer),
        )
        data = TrainingData(
            train=loader,
            tokenizer=tokenizer,
            held_out=self._held_out(tokenizer),
            digest=_digest(summary.manifests, loader),
            inputs=summary.inputs,
            learnt=None if loader.packing is None else str(loader.packing),
        )
        notes = corpora_notes(recipe, recipe.data, self.config, self.options, summary, loader, data)
        return replace(data, notes=tuple(notes))

    def _held_out(self, tokenizer: Tokenizer) -> HeldOutText | None:
        """Held-out samples in a fixed random order, so that the first N are a fair part of all."""
        recipe = self.recipe
        isolation = recipe.isolation(tokenizer)
        length = recipe.training.sequence_length
        folders = [
            (path, 1.0)
            for path, _ in recipe.data.folders("held_out")
            if num_samples(path, length, isolation)
        ]
        if not folders:
            return None
        loader = Loader(folders, length, seed=0, isolation=isolation)
        wanted = max(recipe.validation.max_tokens // length, 1)
        return HeldOutText(
            loader,
            bytes_of_ids(tokenizer, self.config.vocab_size),
            num_samples=min(wanted, loader.samples_per_pass),
            batch_size=recipe.training.micro_batch_size,
            num_inputs=length,
        )


def _digest(manifests: dict[str, dict[str, dict[str, Any]]], loader: Loader) -> str:
    """Names the data: all manifests, and how documents were packed where that decides samples."""
    parts = [json.dumps(manifests, sort_keys=True)]
    if loader.packing is not None:
        parts.append(PACKING_FORM + json.dumps(asdict(loader.packing), sort_keys=True))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
