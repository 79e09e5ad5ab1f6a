"""What the request and reply schemas share: strict reading, sampling fields, usage.

An unknown field is refused by name (`extra="forbid"`), a number in quotes is no number
(`strict`), and NaN is none either. OpenAI's fields that have no effect here are declared, so that
a client may send them; everything else it may send is in the list below.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
)
from pydantic_core import PydanticCustomError

TAGS = frozenset(
    "one-text several-texts text-parts token-ids token-id-lists named-tool tool-mode".split()
)
"""Names of union members: pydantic puts them into error paths, where no client knows them."""
TAGGED = ("messages", "response_format")
"""Fields whose members go by their `role` or `type`: pydantic puts that into the path too."""

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_INT64 = 2**63 - 1
MAX_JSON_DEPTH = 64

StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Strict(BaseModel):
    """A request's object: no unknown fields, no silent conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def mismatch(field: str, message: str) -> PydanticCustomError:
    """A fault between fields, with the name of the one to mend."""
    return PydanticCustomError("mismatch", "{message}", {"message": message, "param": field})


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
    include_usage: bool = Field(
        default=False, description="A last chunk with `usage` and no choices."
    )
    include_obfuscation: Literal[False] | None = Field(
        default=None, description="OpenAI's padding of chunks; only `false`."
    )


def one_or_several(value: Any) -> str:
    return "one-text" if isinstance(value, str) else "several-texts"


Stops = Annotated[
    Annotated[str, Tag("one-text")] | Annotated[list[StopText], Tag("several-texts")],
    Discriminator(one_or_several),
]


class SamplingFields(Strict):
    """How an answer is sampled and where it ends: the same in chats and completions."""

    model: str | None = Field(
        default=None, description="The served model's name (see /v1/models), or left out."
    )
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
        max_length=1024,
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
    metadata: dict[str, str] | None = Field(default=None, description="Accepted, without effect.")
    store: bool | None = Field(default=None, description="Accepted, without effect.")
    top_k: int | None = Field(
        default=None, ge=1, le=MAX_INT64, description="Extension: the likeliest k tokens only."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Extension: tokens of at least this share of the top."
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, description="Extension: above 1 makes repetition less likely."
    )

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "":
            raise ValueError("a stop string must not be empty")
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        return stop

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
