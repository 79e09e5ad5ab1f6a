"""What a checkpoint advises beside its weights: which tokens end an answer, how it is sampled.

A folder says it in `generation_config.json` (`eos_token_id` also in `config.json`) and `chat.json`;
a GGUF file in the keys `tokenizer.ggml.{eos,eot,eom}_token_id` and `general.sampling.*` (gguf-py's
constants.py). Those have room for three ends: where there are more, a key of ours lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from rorqual.config import fill, settings
from rorqual.errors import CheckpointError, ConfigError, RorqualError
from rorqual.files import is_there, read_json
from rorqual.weights.folder import CONFIG
from rorqual.weights.gguf.format import Value, single
from rorqual.weights.source import TensorSource

GENERATION = "generation_config.json"
CHAT_CARD = "chat.json"  # what a chat says first, and how the model likes to be sampled
END_KEYS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
ENDS_KEY = "rorqual.stop_token_ids"
EOS = "eos_token_id"
IDS = ("bos_token_id", EOS, "pad_token_id")
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# How many of the last tokens the penalty counts: -1 is all, as ours and transformers' does; 0 none.
LAST_N = "general.sampling.penalty_last_n"
NAMES = tuple(SAMPLING_KEYS.values())
# Fields of generation_config.json that advise nothing.
_SILENT = {*IDS, "do_sample", "transformers_version"}
# What transformers does without the field too.
_NEUTRAL = {
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "use_cache": True,
}


@settings
class SamplingDefaults:
    """A model's own advice; None leaves SamplingParams' default."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    max_tokens: int | None = Field(default=None, ge=1)


@settings
class ChatCard:
    """What a chat says first, questions to try, and the sampling that suits the model."""

    opening: str | None = None
    examples: tuple[str, ...] = ()
    sampling: SamplingDefaults = SamplingDefaults()


@dataclass(frozen=True)
class Advice:
    """`end_ids` as they were given, the tokenizer's own perhaps among them; `sampling` are fields
    of SamplingDefaults. `ignored` is what transformers would follow and we do not, `only_files`
    what we follow and GGUF has no key for.
    """

    end_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    only_files: tuple[str, ...] = ()

    @property
    def unsaid(self) -> tuple[str, ...]:
        """What only the folder's files can say."""
        return self.ignored + self.only_files

    def gguf_keys(self, eos_id: int | None) -> dict[str, Value]:
        """The keys of a file whose tokenizer ends with that id; None if it has no tokenizer."""
        ends = list(dict.fromkeys([*([] if eos_id is None else [eos_id]), *self.end_ids]))
        keys: dict[str, Value] = {}
        if eos_id is not None:
            keys |= dict(zip(END_KEYS, ends, strict=False))
        if len(ends) > len(END_KEYS) or (ends and eos_id is None):
            keys[ENDS_KEY] = np.array(ends, dtype=np.int32)
        for key, name in SAMPLING_KEYS.items():
            value = self.sampling.get(name)
            if value is not None:
                keys[key] = value if name == "top_k" else float(value)
        if "repetition_penalty" in self.sampling:
            keys[LAST_N] = -1
        return keys

    def generation_config(self) -> dict[str, Any]:
        """The fields of transformers' file."""
        table: dict[str, Any] = {}
        if self.end_ids:
            table[EOS] = list(self.end_ids) if len(self.end_ids) > 1 else self.end_ids[0]
        sampling = {name: self.sampling[name] for name in NAMES if name in self.sampling}
        if sampling.get("temperature") == 0:
            del sampling["temperature"]  # which transformers does not take
            table["do_sample"] = False
        elif sampling.keys() - {"repetition_penalty"}:
            table["do_sample"] = True
        return table | sampling


def read_card(folder: Path) -> ChatCard:
    """What `chat.json` says; an empty card without it."""
    file = folder / CHAT_CARD
    return fill(ChatCard, read_json(file, ConfigError), file) if is_there(file) else ChatCard()


def advice_of_folder(folder: Path, vocab_size: Callable[[], int]) -> Advice:
    """Of the files in a folder. ConfigError names the file of an impossible id or value.

    `vocab_size` is asked for only where there are ids to hold against it.
    """
    card = read_card(folder)
    end_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = {}
    ignored: tuple[str, ...] = ()
    for name in (GENERATION, CONFIG):
        file = folder / name
        table = read_json(file, ConfigError) if is_there(file) else {}
        end_ids = end_ids or _ends(table.get(EOS), vocab_size, f"{EOS} in {name}", file)
        if name == GENERATION:
            sampling = _sampling(table, file)
            ignored = tuple(f"{key} of {name}" for key in table if _is_ignored(key, table[key]))
    advised = _given(card.sampling)
    unsaid = [f"{name} of {CHAT_CARD}" for name in ("opening", "examples") if getattr(card, name)]
    if "max_tokens" in advised:
        unsaid.append(f"sampling.max_tokens of {CHAT_CARD}")
    return Advice(end_ids, sampling | advised, ignored, tuple(unsaid))


def advice_files(source: TensorSource) -> dict[str, dict[str, Any]]:
    """The tables of `generation_config.json` and `chat.json` of a checkpoint, by file name; ids
    that only config.json has are put into the first. ConfigError for a broken file.
    """
    if isinstance(advice := getattr(source, "advice", None), Advice):  # GGUF's keys
        generation, chat = advice.generation_config(), {}
    else:
        files = [source.path / name for name in (GENERATION, CHAT_CARD)]
        generation, chat = (read_json(f, ConfigError) if is_there(f) else {} for f in files)
        for key in IDS:
            if generation.get(key) is None and source.table.get(key) is not None:
                generation[key] = source.table[key]
    return {name: table for name, table in ((GENERATION, generation), (CHAT_CARD, chat)) if table}


def advice_of_gguf(
    metadata: Mapping[str, Value], vocab_size: Callable[[], int], where: Path
) -> Advice:
    """Of a file's keys, as `advice_of_folder`. CheckpointError names an impossible one."""
    ends: list[int] = []
    for key in (*END_KEYS, ENDS_KEY):
        value = metadata.get(key)
        found = value.tolist() if isinstance(value, np.ndarray) else value
        ends += _ends(found, vocab_size, key, where, CheckpointError)
    sampling: dict[str, Any] = {}
    for key, name in SAMPLING_KEYS.items():
        if key in metadata:
            sampling |= _given(_sampling_of_key(key, name, metadata[key], where))
    if single(metadata, LAST_N) == 0:
        sampling.pop("repetition_penalty", None)
    return Advice(tuple(dict.fromkeys(ends)), sampling)


def _sampling_of_key(key: str, name: str, value: Value, where: Path) -> SamplingDefaults:
    """One of `general.sampling.*`, which has llama.cpp's own spellings of none and of greedy."""
    wanted = value
    if isinstance(value, float):  # float32: the shortest decimal that gives it was meant
        wanted = float(str(np.float32(value)))
    if name in ("top_k", "temperature") and isinstance(value, int | float) and value < 0:
        wanted = 0
    try:
        return fill(SamplingDefaults, {name: wanted}, where, is_foreign=True)
    except ConfigError as problem:
        raise CheckpointError(
            f"{key} cannot be: {problem.what.removeprefix(f'{name}: ')}",
            where=where,
            found=str(value)[:80],
            fix="get the file again from its source, or correct the key",
        ) from None


def _sampling(table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The fields that mean something here; transformers' file has many that do not."""
    found = {name: table[name] for name in NAMES if name in table}
    values = _given(fill(SamplingDefaults, found, file, is_foreign=True))
    if table.get("do_sample") is False:  # which the penalty is not part of
        penalty = values.get("repetition_penalty")
        values = {"temperature": 0.0} | ({} if penalty is None else {"repetition_penalty": penalty})
    return values


def _given(advice: SamplingDefaults) -> dict[str, Any]:
    values = {entry.name: getattr(advice, entry.name) for entry in fields(advice)}
    if values["top_k"] == 0:  # transformers' spelling of None
        values["top_k"] = None
    return {name: value for name, value in values.items() if value is not None}


def _ends(
    found: Any,
    vocab_size: Callable[[], int],
    what: str,
    file: Path,
    error: type[RorqualError] = ConfigError,
) -> tuple[int, ...]:
    """The ids of one number or a list of them; none for null."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size():
            raise error(
                f"{what} names a token that cannot be",
                where=file,
                found=repr(token_id)[:80],
                expected=f"ids from 0 to {vocab_size() - 1}",
                fix="restore the file from the checkpoint's source",
            )
    return tuple(ids)


def _is_ignored(key: str, value: Any) -> bool:
    """Whether the field asks for something that we do not do."""
    is_known = key in _SILENT or key in NAMES or key.startswith("_")
    return not is_known and value is not None and _NEUTRAL.get(key, ()) != value
