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
    """One [[data.sources]] entry: a registry name, `generated:<name>`, or a `path` of your own.

    `epochs` is how often a pass of training sees it; limits take a random sample, chosen by hash.
    """

    name: str | None = None
    path: str | None = None
    licence: str | None = None
    epochs: float = 1.0
    max_bytes: int | None = Field(default=None, gt=0)
    max_documents: int | None = Field(default=None, gt=0)
    held_out: float | None = None

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
        if self.epochs < 0 or (self.held_out is not None and not 0 <= self.held_out < 1):
            raise ValueError("epochs is zero or more, held_out from 0 to below 1")
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

    `held_out` is the share of documents kept from training, in each source at least one document
    and never all; of .txt files, which may be few and long, it is the share of blocks.
    Sequence length is the training's matter.
    """

    folder: str
    sources: list[SourceSettings] = field(default_factory=list)
    corpora: str = str(CORPORA)
    held_out: float = 0.01
    fim_rate: float = 0.1  # §4.1
    split_punctuation_rate: float = 0.1
    seed: int = Field(default=0, ge=0, lt=2**63)
    dedupe: bool = True

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if not self.sources:
            raise ValueError("sources is empty: name at least one [[data.sources]]")
        if not 0 <= self.held_out < 1:
            raise ValueError("held_out is a share, from 0 to below 1")
        for name in ("fim_rate", "split_punctuation_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1")
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
    vocab_size: int = Field(default=8192, gt=0)
    merge_digits: bool = True
    train_bytes: int = Field(default=20_000_000, gt=0)

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
