"""A checkpoint with all that lies beside its weights: tokenizer, advice on sampling, chat card.

It is a Hugging Face folder, a folder of rank shards, or a GGUF file. Beside the weights a folder
may hold `chat.json`, which the terminal chat reads:
`{"opening": "...", "examples": ["..."], "sampling": {"temperature": 0.3}}`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from rorqual.bundled import BUNDLED, checkpoint_path
from rorqual.errors import ConfigError, TokenizerError, UsageError, listing
from rorqual.files import is_there, read_json
from rorqual.log import logger
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.flops import count_parameters
from rorqual.ops.device import resolve_device
from rorqual.ops.kernels import AUTO, NATIVE
from rorqual.ops.native import level, library
from rorqual.tokenizer import Tokenizer, load_tokenizer
from rorqual.weights.advice import (
    CHAT_CARD,
    Advice,
    ChatCard,
    advice_of_folder,
    advice_of_gguf,
    read_card,
)
from rorqual.weights.folder import config_of, no_checkpoint, refuse_empty
from rorqual.weights.gguf.file import SPLIT_NAME, GgufFile, read_gguf
from rorqual.weights.gguf.metadata import require_deepseek2
from rorqual.weights.gguf.reader import GgufSource, load_gguf_tokenizer
from rorqual.weights.gguf.tokenizer import TEMPLATE, tokenizer_of
from rorqual.weights.model_reader import LoadDtype, load_from
from rorqual.weights.open import SourceKind, kind_of, load_config, open_source
from rorqual.weights.shards.reader import open_shards
from rorqual.weights.source import TensorSource

DTYPES = ("auto", *get_args(LoadDtype))
MAX_FLOAT32_PARAMETERS = 1_000_000_000


def auto_dtype(config: ModelConfig, *, has_kernels: bool) -> LoadDtype:
    """What "auto" means for a model of this shape: "native" on a CPU with the C++ kernels. Choice:
    elsewhere bfloat16 where float32 would take more than 4 GB.
    """
    if has_kernels:
        return "native"
    is_small = count_parameters(config).total <= MAX_FLOAT32_PARAMETERS
    return "float32" if is_small else "bfloat16"


def has_kernels(device: torch.device, kernels: str = AUTO) -> bool:
    """Whether the C++ kernels run there, and no others were asked for. Choice: plain C++, for other
    processors than x86 with AVX2, runs for who names it; nobody has measured it against torch.
    """
    if device.type != "cpu" or kernels not in (AUTO, NATIVE.name) or library() is None:
        return False
    return kernels == NATIVE.name or level() != "portable"


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint of any kind, and the name that it is known by.

    `path` is a folder, or a GGUF file. `tokenizer` is a folder or file that is used instead of the
    checkpoint's own, `config` a shape instead of that which lies beside rank shards.
    """

    name: str
    path: Path
    kind: SourceKind
    tokenizer: Path | None = None
    config: ModelConfig | None = None

    @classmethod
    def find(
        cls, name: str, tokenizer: str | Path | None = None, *, shards_config: Path | None = None
    ) -> ModelFolder:
        """`tiny` is the model in the package; anything else is a path, its kind told by content; of
        a run, its latest checkpoint.

        CheckpointError for what is no checkpoint, or a GGUF file of another architecture.
        """
        path = checkpoint_path(name)
        own = None if tokenizer is None else checkpoint_path(tokenizer)
        if not path.exists():
            raise no_checkpoint(path).with_(
                expected=f"a checkpoint folder, a GGUF file, or the bundled model {BUNDLED!r}"
            )
        kind = kind_of(path)
        if kind == "huggingface":
            if not path.is_dir():
                raise no_checkpoint(path)
            refuse_empty(path)
        config = None
        if shards_config is not None:
            if kind != "shards":
                raise UsageError(
                    f"--config {shards_config} is for rank shards, this is another kind",
                    where=path,
                    fix="leave it out: the checkpoint has its own",
                )
            config = config_of(read_json(shards_config, ConfigError), shards_config)
        title = BUNDLED if name == BUNDLED else _title(Path(name))  # of a run, its own name
        folder = cls(title, path, kind, own, config)
        if kind == "gguf":
            folder._gguf  # noqa: B018  another architecture is refused here
        return folder

    def card(self) -> ChatCard:
        """What `chat.json` says; an empty card without it."""
        return read_card(self.path) if self.path.is_dir() else ChatCard()

    def is_chat(self) -> bool:
        """Whether there is a chat template in the tokenizer's files, or a chat card."""
        if self._beside(CHAT_CARD) is not None:
            return True
        if self.tokenizer is None and self.kind == "gguf":
            return TEMPLATE in self._gguf.metadata
        return _has_template(self.tokenizer or self.path)

    def sampling(self, **chosen: Any) -> dict[str, Any]:
        """The user's values, else the card's, else the checkpoint's advice; fields of
        `SamplingParams`, whose defaults stand for the rest.

        `chosen` are such fields; None means not chosen. The advice is that of
        `generation_config.json`, before that of a GGUF file's keys; an end that is no id of the
        tokenizer's is refused under its file's name, for no row of the model beyond is ever drawn.
        """
        found = [self._folder_advice] if self.path.is_dir() else []
        if self.kind == "gguf":
            found.append(advice_of_gguf(self._gguf.metadata, self._num_ids, self._gguf.path))
        values: dict[str, Any] = {}
        for advice in reversed(found):
            values |= advice.sampling
            if advice.end_ids:
                values["stop_token_ids"] = advice.end_ids
        if ends := values.get("stop_token_ids"):
            # The tokenizer's own end is one anyway, unless it is to be ignored.
            own = self.load_tokenizer().eos_id
            values["stop_token_ids"] = tuple(end for end in ends if end != own)
        return values | {name: value for name, value in chosen.items() if value is not None}

    def load_tokenizer(self) -> Tokenizer:
        """The one that was chosen, else the checkpoint's; TokenizerError names the flag."""
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is not None:
            if self.tokenizer.exists() and kind_of(self.tokenizer) == "gguf":
                return load_gguf_tokenizer(self.tokenizer)
            return load_tokenizer(self.tokenizer)
        try:
            if self.kind == "gguf":
                return tokenizer_of(self._gguf.metadata, self._gguf.path)
            return load_tokenizer(self.path)
        except TokenizerError as problem:
            mend = f"{problem.fix}; or " if problem.fix else ""
            raise problem.with_(
                fix=f"{mend}name another with --tokenizer (chat, generate, serve, eval)"
            ) from None

    def model_config(self) -> ModelConfig:
        """What the checkpoint says that the model is; its weights are not looked at."""
        if self.config is not None:
            return self.config
        if self.kind == "gguf":
            with self._open() as source:
                return source.config
        return load_config(self.path)

    def max_positions(self) -> int:
        return self.model_config().max_position_embeddings

    def load_model(
        self, dtype: str = "auto", device: str | torch.device = "auto", kernels: str = AUTO
    ) -> DeepseekV3:
        """The weights, as one of `DTYPES`; UsageError for another dtype.

        `device` is auto (a GPU where torch sees one), cpu, cuda or cuda:N; UsageError for another.

        Whatever is stored, FP8 and GGUF's types too, is decoded to "float32" or "bfloat16"; with
        the others matrices stay in bytes like their file's (see `weights.load`, for `kernels` too).
        "auto": see `auto_dtype`.
        """
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
        device = resolve_device(device)
        with self._open() as source:
            if dtype == "auto":
                dtype = auto_dtype(source.config, has_kernels=has_kernels(device, kernels))
            return load_from(source, cast(LoadDtype, dtype), device, kernels)

    def _open(self) -> TensorSource:
        if self.config is not None:
            return open_shards(self.path, self.config)
        return GgufSource(self._gguf) if self.kind == "gguf" else open_source(self.path)

    @functools.cached_property
    def _gguf(self) -> GgufFile:
        """The file's header, read once."""
        file = read_gguf(self.path)
        require_deepseek2(file.metadata, file.path)
        return file

    @functools.cached_property
    def _folder_advice(self) -> Advice:
        advice = advice_of_folder(self.path, self._num_ids)
        if advice.ignored:
            logger(__name__).warning(
                "%s: not followed here: %s", self.path, listing(advice.ignored)
            )
        return advice

    def _num_ids(self) -> int:
        return self.load_tokenizer().vocab_size

    def _beside(self, name: str) -> Path | None:
        """A file in the model's folder; a GGUF file that was named itself has none."""
        file = self.path / name
        return file if self.path.is_dir() and is_there(file) else None


def _title(path: Path) -> str:
    """A folder's name, or a GGUF file's without its ending and its number."""
    name = path.resolve().name
    if path.is_dir():
        return name
    part = SPLIT_NAME.fullmatch(name)
    return part["prefix"] if part else name.removesuffix(".gguf")


def _has_template(path: Path) -> bool:
    """Whether a folder, a `tokenizer.json` or a GGUF file brings a chat template."""
    if path.exists() and kind_of(path) == "gguf":
        with read_gguf(path) as file:
            return TEMPLATE in file.metadata
    folder = path if path.is_dir() else path.parent
    if is_there(folder / "chat_template.jinja"):
        return True
    settings_file = folder / "tokenizer_config.json"
    if not is_there(settings_file):
        return False
    return bool(read_json(settings_file, ConfigError).get("chat_template"))
