"""What the request and reply schemas share: strict reading, sampling fields, usage.

A number in quotes is no number (`strict`), and NaN is none either. Fields that are not declared are
kept beside (`extra="allow"`): `fields.py` knows what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rorqual.serve.fields import BY_PLACE
from rorqual.serve.notes import Notes, extra_fields

TAGS = frozenset(
    "one-text several-texts text-parts token-ids token-id-lists named-tool tool-mode is-thinking "
    "thinking-object allowed-tools "
    # of /v1/messages and /v1/responses
    "text-blocks several-blocks text-block thinking-block redacted_thinking-block tool_use-block "
    "tool_result-block several-items message-item function_call-item function_call_output-item "
    "custom_tool_call-item custom_tool_call_output-item "
    "reasoning-item item_reference-item text-part refusal-part text-format json_object-format "
    "json_schema-format regex-format choice-format grammar-format".split()
)
"""Names of union members: pydantic puts them into error paths, where no client knows them."""
TAGGED = ("messages", "response_format")
"""Fields whose members go by their `role` or `type`: pydantic puts that into the path too."""

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_INT64 = 2**63 - 1
MAX_ALLOWED_IDS = 10_000
MAX_BIASES = 1024
SYNONYMS = {
    "n_predict": "max_tokens",
    "n_cmpl": "n",
    "repeat_penalty": "repetition_penalty",
    "no_stop_trim": "include_stop_str_in_output",
}
MAX_JSON_DEPTH = 64

TokenId = Annotated[int, Field(ge=0, le=MAX_INT64)]

StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Strict(BaseModel):
    """A request's object, or a part of one: no silent conversion."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    PLACE: ClassVar[str] = ""
    """Where `fields.py` lists its fields."""


INVALID_GRAMMAR = "invalid_grammar"
"""The code of every fault in a grammar, whoever finds it: a 400."""


def mismatch(field: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    """A fault between fields, with the name of the one to mend."""
    context = {"message": message, "param": field, "code": code}
    return PydanticCustomError("mismatch", "{message}", context)


class Body(Strict):
    """A request's whole body; `notes` tell what had no effect."""

    model: str | None = Field(
        default=None, description="The served model's name (see /v1/models), or left out."
    )
    _notes: Notes = PrivateAttr(default_factory=Notes)

    @property
    def notes(self) -> Notes:
        return self._notes

    @model_validator(mode="after")
    def _look_at_extras(self) -> Body:
        notes = self._notes  # once: pydantic looks for it among all extras
        for extra in extra_fields(self):
            assert isinstance(extra.owner, Strict), "no other kind of object keeps extras"
            row = BY_PLACE.get(extra.owner.PLACE, {}).get(extra.name)
            if row is None:
                notes.unknown.append(extra)
            elif row.fate == "refused" and not row.is_off(extra.value):
                hint = f"; {row.note}" if row.note else ""
                message = f"{extra.place} is not supported with this value{hint}"
                raise mismatch(extra.place, message, "unsupported")
            if row is None or (row.fate == "noted" and not row.is_off(extra.value)):
                notes.ignore(extra.place)
        return self


def _check_depth(value: dict[str, Any]) -> dict[str, Any]:
    """Templates and grammars go through such an object by recursion: a stack is finite."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return value
    raise ValueError(f"is nested more than {MAX_JSON_DEPTH} deep")


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_depth)]


class StreamOptions(Strict):
    include_usage: bool | None = Field(
        default=None, description="A last chunk with `usage` and no choices."
    )
    continuous_usage_stats: bool | None = Field(
        default=None, description="Extension: with include_usage, `usage` so far in each chunk."
    )
    include_obfuscation: bool | None = Field(
        default=None, description="OpenAI's padding of chunks: without effect."
    )


def one_or_several(value: Any) -> str:
    return "one-text" if isinstance(value, str) else "several-texts"


Stops = Annotated[
    Annotated[str, Tag("one-text")] | Annotated[list[StopText], Tag("several-texts")],
    Discriminator(one_or_several),
]


class SamplingFields(Body):
    """How an answer is sampled and where it ends: the same in chats and completions."""

    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_INT64,
        description="Longest answer. Default: 4096 or what the context leaves, if that is less. "
        "An answer that fills the context ends there with finish_reason `length`.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Used as it is, never remapped; 0 takes the likeliest token. Default: the "
        "model's own advice, else 0.3.",
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(
        default=None,
        description="Token id (as a string) to -100..100; -100 bans the token.",
        max_length=MAX_BIASES,
    )
    seed: int | None = Field(
        default=None,
        ge=-MAX_INT64 - 1,
        le=2 * MAX_INT64 + 1,
        description="Fixes the random numbers; choice i of `n` draws from seed + i. Any 64 bits, "
        "signed or not, of which the lower 63 count.",
    )
    stop: Stops | None = Field(
        default=None, description="A text, or up to 16: the answer ends before it."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Answers per prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Accepted, without effect.")
    metadata: JsonObject | None = Field(default=None, description="Accepted, without effect.")
    store: bool | None = Field(default=None, description="Accepted, without effect.")
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_INT64,
        description="Extension: the likeliest k tokens only; 0 and -1 switch it off.",
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Extension: tokens of at least this share of the top."
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, description="Extension: above 1 makes repetition less likely."
    )
    stop_token_ids: list[TokenId] | None = Field(
        default=None, max_length=1024, description="Extension: tokens that end the answer too."
    )
    allowed_token_ids: list[TokenId] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_ALLOWED_IDS,
        description="Extension: no other tokens come, the end neither unless it is among them.",
    )
    ignore_eos: bool | None = Field(
        default=None, description="Extension: the end-of-sentence token does not end the answer."
    )
    min_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_INT64,
        description="Extension: the answer's first tokens, as many, are no end of it.",
    )
    skip_special_tokens: bool | None = Field(
        default=None,
        description="Extension: `false` shows the names of tokens that begin, end and fill texts.",
    )

    include_stop_str_in_output: bool | None = Field(
        default=None, description="Extension: what ends the answer is part of it."
    )
    no_stop_trim: bool | None = Field(
        default=None, description="SGLang's name of include_stop_str_in_output."
    )
    n_predict: int | None = Field(
        default=None, ge=1, le=MAX_INT64, description="llama.cpp's name of max_tokens."
    )
    n_cmpl: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES, description="llama.cpp's name of n."
    )
    repeat_penalty: float | None = Field(
        default=None, gt=0, le=100, description="llama.cpp's name of repetition_penalty."
    )
    n_probs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="llama.cpp's way to ask for logprobs and their alternatives; 0 asks for none.",
    )
    thinking_token_budget: int | None = Field(
        default=None,
        ge=0,
        le=MAX_INT64,
        description="Extension: after so many tokens of reasoning it ends.",
    )
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator(
        "max_tokens",
        "max_completion_tokens",
        "n_predict",
        "thinking_token_budget",
        mode="before",
        check_fields=False,
    )
    @classmethod
    def _minus_one_is_the_default(cls, value: Any) -> Any:
        if isinstance(value, int) and value < -1:
            raise ValueError(f"must be a number of tokens, or -1, the default (found {value})")
        return None if value == -1 else value

    @model_validator(mode="after")
    def _read_synonyms(self) -> SamplingFields:
        for name, meant in SYNONYMS.items():
            self.read_as(name, meant, getattr(self, name))
        return self

    def read_as(self, name: str, meant: str, value: Any) -> None:
        """The field `name` asks for what `meant` does, unless `value` is None."""
        other = getattr(self, meant)
        if value is None or value == other:
            return
        if other is not None:
            message = f"{self.written(meant)} and {name} differ: give one of them"
            raise mismatch(name, message)
        setattr(self, meant, value)
        self.note_written(meant, name)

    def note_written(self, meant: str, name: str) -> None:
        self._written[meant] = name

    def written(self, name: str) -> str:
        """What the client calls a field."""
        return self._written.get(name, name)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "":
            raise ValueError("a stop string must not be empty")
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_bias_size(cls, bias: Any) -> Any:
        """Before each of its values: pydantic counts them last."""
        if isinstance(bias, dict) and len(bias) > MAX_BIASES:
            raise ValueError(f"has {len(bias)} tokens; at most {MAX_BIASES} are read")
        return bias

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) <= 9):
                raise ValueError(f"{token[:20]!r} is not a token id")
            if not -100 <= value <= 100:
                raise ValueError(f"the bias of {token} is outside -100..100")
        return bias


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(ge=0)


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = Field(ge=0, description="Tokens between <think> and </think>.")
    accepted_prediction_tokens: int = Field(ge=0, description="MTP drafts that were right.")
    rejected_prediction_tokens: int = Field(ge=0, description="MTP drafts that were not.")
    acceptance_by_position: list[float] = Field(
        description="Share of drafts accepted at positions 1..K; empty without speculation."
    )


class UsageBody(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_cache_hit_tokens: int = Field(ge=0)
    prompt_cache_miss_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
