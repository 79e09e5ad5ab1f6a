"""A model's folder as the engine meets it: where it is, how it likes to be sampled, how it chats.

Beside the Hugging Face files a folder may hold `chat.json`, which the terminal chat reads:
`{"opening": "...", "examples": ["..."], "sampling": {"temperature": 0.3}}`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import Field

from rorqual.config import fill, settings
from rorqual.engine.params import SamplingParams
from rorqual.errors import CheckpointError, ConfigError, UsageError
from rorqual.files import read_json
from rorqual.model import DeepseekV3
from rorqual.model.flops import count_parameters
from rorqual.tokenizer import Tokenizer, load_tokenizer
from rorqual.weights import load, load_config

DTYPES = ("auto", "float32", "bfloat16")
BUNDLED = "tiny"
CHAT_CARD = "chat.json"
GENERATION = "generation_config.json"
MAX_FLOAT32_PARAMETERS = 1_000_000_000


@settings
class SamplingDefaults:
    """A model's own advice; None leaves SamplingParams' default."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)


@settings
class ChatCard:
    """What a chat says first, questions to try, and the sampling that suits the model."""

    opening: str | None = None
    examples: tuple[str, ...] = ()
    sampling: SamplingDefaults = SamplingDefaults()


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint folder, and the name that the user gave it."""

    name: str
    path: Path

    @classmethod
    def find(cls, name: str) -> ModelFolder:
        """`tiny` is the model in the package; anything else is a path."""
        if name != BUNDLED:
            path = Path(name)
            if not path.is_dir():
                raise CheckpointError(
                    "is a file; a model's folder is needed" if path.exists() else "no such folder",
                    where=path,
                    expected=f"a checkpoint folder, or the bundled model {BUNDLED!r}",
                    fix="check the path; models are not downloaded",
                )
            return cls(path.resolve().name, path)
        path = Path(__file__).parents[1] / BUNDLED
        if not (path / "config.json").is_file():
            raise CheckpointError(
                "the bundled model is missing from this installation",
                where=path,
                fix="install the package again, train it with `rorqual train`, "
                "or name a folder with --model",
            )
        return cls(BUNDLED, path)

    def card(self) -> ChatCard:
        """What `chat.json` says; an empty card without it."""
        file = self.path / CHAT_CARD
        return fill(ChatCard, read_json(file, ConfigError), file) if file.exists() else ChatCard()

    def is_chat(self) -> bool:
        """Whether the folder carries a chat template of its own, or a chat card."""
        if (self.path / CHAT_CARD).exists() or (self.path / "chat_template.jinja").exists():
            return True
        file = self.path / "tokenizer_config.json"
        return file.exists() and bool(read_json(file, ConfigError).get("chat_template"))

    def sampling(self, **chosen: Any) -> SamplingParams:
        """The user's values, else the card's, else `generation_config.json`'s, else the defaults.

        `chosen` are SamplingParams' fields; None means not chosen.
        """
        values = self._generation_config() | _given(self.card().sampling)
        values |= {name: value for name, value in chosen.items() if value is not None}
        return SamplingParams(**values)

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    def max_positions(self) -> int:
        return load_config(self.path).max_position_embeddings

    def load_model(self, dtype: str = "auto") -> DeepseekV3:
        """The weights, as "float32", "bfloat16" or "auto"; UsageError for another dtype.

        Choice: "auto" is float32 up to a billion parameters, bfloat16 beyond.
        """
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
        if dtype == "auto":
            num_parameters = count_parameters(load_config(self.path)).total
            dtype = "float32" if num_parameters <= MAX_FLOAT32_PARAMETERS else "bfloat16"
        return load(self.path, "float32" if dtype == "float32" else "bfloat16")

    def _generation_config(self) -> dict[str, Any]:
        """The fields of transformers' file that mean something here; it has many that do not."""
        file = self.path / GENERATION
        table = read_json(file, ConfigError) if file.exists() else {}
        names = ("temperature", "top_p", "top_k", "min_p")
        values = _given(fill(SamplingDefaults, {k: table[k] for k in names if k in table}, file))
        if table.get("do_sample") is False:
            values = {"temperature": 0.0}
        if isinstance(ends := table.get("eos_token_id"), list):
            values["stop_token_ids"] = tuple(ends)
        return values


def _given(advice: SamplingDefaults) -> dict[str, Any]:
    values = {field.name: getattr(advice, field.name) for field in fields(advice)}
    if values["top_k"] == 0:  # transformers' spelling of None
        values["top_k"] = None
    return {name: value for name, value in values.items() if value is not None}
