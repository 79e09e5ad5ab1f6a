"""The sections [tokenizer] and [data] of a recipe."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path

from pydantic import Field, model_validator

from rorqual.bundled import BUNDLED, checkpoint_path
from rorqual.config import settings
from rorqual.data.sources import CORPORA, SOURCES
from rorqual.errors import listing

GENERATED = "generated:"


@settings
class SourceSettings:
    """One [[data.sources]] entry: a registry name, `generated:<name>`, or a `path` of your own."""

    name: str | None = None
    """A source of `rorqual data list`, or `generated:NAME`. With `path`: the name of its folder of
    shards; left out, the last part of the path."""
    path: str | None = None
    """Your own file, folder or glob; relative to the folder where the command is run."""
    licence: str | None = None
    """Noted in the shards' manifest; only beside `path`, since packages state their own."""
    epochs: float = Field(default=1.0, ge=0)
    """How often one pass sees the source, beside the others: it sets the mixture, not the length of
    the run. 0.5 takes another half each pass; 0 leaves it out."""
    max_bytes: int | None = Field(default=None, gt=0)
    """At most this much text: a random sample of its documents, chosen by hash."""
    max_documents: int | None = Field(default=None, gt=0)
    """At most this many documents, chosen by hash. Of generated sources: how many to make, and
    required."""
    held_out: float | None = Field(default=None, ge=0, lt=1)
    """This source's own share in place of `data.held_out`; left out, that one, and 0 for generated
    sources."""

    @model_validator(mode="after")
    def _check(self) -> SourceSettings:
        if self.name is None and self.path is None:
            raise ValueError("a source needs a name (see `rorqual data list`) or a path")
        if self.is_packaged and self.name not in SOURCES:
            raise ValueError(
                f"no such source {self.name!r}: give a path, or one of {listing(sorted(SOURCES))}"
            )
        if self.is_generated and self.max_documents is None:
            raise ValueError(f"{self.name} needs max_documents: how many to generate")
        return self

    @property
    def is_generated(self) -> bool:
        return self.path is None and (self.name or "").startswith(GENERATED)

    @property
    def is_packaged(self) -> bool:
        """Whether its text comes out of packages, which `rorqual data fetch` gets."""
        return self.path is None and not self.is_generated

    @property
    def label(self) -> str:
        """The name of the source's folder."""
        name = self.name or Path(self.path or "").name
        return re.sub(r"[^\w.-]+", "-", name.removeprefix(GENERATED)).strip("-.") or "source"


@settings
class DataSettings:
    """[data]: where the tokens go, from which sources, and how documents are split and dressed.

    Sequence length is the training's matter.
    """

    folder: str
    """Where the token shards go; text or a tokenizer of another kind needs another folder."""
    sources: list[SourceSettings] = field(default_factory=list)
    """One section [[data.sources]] for each source; at least one."""
    corpora: str = str(CORPORA)
    """The folder where `rorqual data fetch` puts the sources of packages."""
    held_out: float = Field(default=0.01, ge=0, lt=1)
    """The share of each source's documents (of `.txt` files: of blocks) that training never sees:
    at least one and never all. 0 holds nothing out, and nothing is validated."""
    fim_rate: float = Field(default=0.1, ge=0, le=1)
    """The share of texts dressed as fill-in-the-middle (§4.1); conversations never are."""
    split_punctuation_rate: float = Field(default=0.1, ge=0, le=1)
    """The share of tokens of punctuation and line break together that are split (§4.1), in texts
    alone."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of what is random in the shards: what is held out, split, dressed."""
    dedupe: bool = True
    """Leaves out documents that come twice, in one source or in two."""

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if not self.sources:
            raise ValueError("sources is empty: name at least one [[data.sources]]")
        labels = [source.label for source in self.sources]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"sources share the folder name {listing(repeated)}: give each a name")
        return self

    def held_out_share(self, source: SourceSettings) -> float:
        """The share of a source that is kept from training; generated ones keep their own
        questions back, so that of these it is none unless the source says so.
        """
        if source.held_out is not None:
            return source.held_out
        return 0.0 if source.is_generated else self.held_out

    def folders(self, split: str = "train") -> list[tuple[Path, float]]:
        """(folder, epochs) of each source, as `Loader` takes them."""
        return [
            (Path(self.folder) / source.label / split, source.epochs) for source in self.sources
        ]


@settings
class TokenizerSettings:
    """[tokenizer]: the folder of the tokenizer (`tiny`: the bundled one); if it does not exist,
    one is trained on the sources, and of that alone the other keys speak.
    """

    folder: str
    """The tokenizer's folder, or `tiny`, the bundled one. Where it does not exist, one is trained
    on the sources; where it does, the other keys here do nothing."""
    vocab_size: int = Field(default=8192, gt=0)
    """Ids of a tokenizer in training, special tokens included: at most this many."""
    merge_digits: bool = True
    """V3's way, up to three digits a token; false: each digit is one."""
    train_bytes: int = Field(default=20_000_000, gt=0)
    """A random sample of this much text trains it."""

    @classmethod
    def of_folder(cls, folder: Path) -> TokenizerSettings:
        """A tokenizer that is there: a folder called `tiny` is not the bundled one."""
        return cls(folder=f"./{folder}" if str(folder) == BUNDLED else str(folder))

    @property
    def path(self) -> Path:
        """The folder; `tiny` is the bundled model's, as for every verb, and `./tiny` one here."""
        return checkpoint_path(self.folder)


@settings
class BuildSettings:
    """The sections of a recipe that a build reads."""

    tokenizer: TokenizerSettings
    data: DataSettings
