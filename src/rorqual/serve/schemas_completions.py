"""The completion route's request and replies: OpenAI's older text interface, with FIM."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from rorqual.serve.field_row import COMPLETIONS
from rorqual.serve.schemas_common import (
    MAX_CHOICES,
    MAX_INT64,
    MAX_TOP_LOGPROBS,
    Body,
    JsonObject,
    TokenId,
    UsageBody,
    mismatch,
)
from rorqual.serve.schemas_forms import FormFields


def _prompt_tag(value: Any) -> str:
    """Which kind of prompt this is, told by its first element."""
    if not isinstance(value, list):
        return "one-text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "token-id-lists"
    return "token-ids" if isinstance(first, int) else "several-texts"


Prompt = Annotated[
    Annotated[str, Tag("one-text")]
    | Annotated[list[str], Tag("several-texts"), Field(min_length=1, max_length=MAX_CHOICES)]
    | Annotated[list[TokenId], Tag("token-ids"), Field(min_length=1, fail_fast=True)]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
        Tag("token-id-lists"),
        Field(min_length=1, max_length=MAX_CHOICES),
    ],
    Discriminator(_prompt_tag),
]


class CompletionRequest(FormFields):
    PLACE: ClassVar[str] = COMPLETIONS

    prompt: Prompt = Field(
        description="A text, texts, token ids, or lists of them. A text gets a begin-of-sentence "
        "token; ids are taken as they are. Names of special tokens in a text are plain text."
    )
    suffix: str | None = Field(
        default=None, description="Fill in the middle: what comes after the answer."
    )
    echo: bool | None = Field(default=None, description="The prompt comes before the answer.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Alternatives per token; with `echo` also of the prompt's tokens.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_INT64,
        description="Longest answer; 0 only scores the prompt. Default: 4096 or what the "
        "context leaves, if that is less.",
    )
    n_predict: int | None = Field(
        default=None, ge=0, le=MAX_INT64, description="llama.cpp's name of max_tokens."
    )
    parse_special: bool | None = Field(
        default=None,
        description="Extension: names of special tokens in the prompt, `<|User|>` and the like, "
        "become these tokens.",
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Extension: `false` leaves out the begin-of-sentence token."
    )
    best_of: int | None = Field(default=None, description="1, or as many as `n`.")

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        self.read_as("n_probs", "logprobs", self.n_probs or None)
        if self.echo and self.suffix:
            raise mismatch("suffix", "echo and suffix do not go together")
        if self.best_of not in (None, 1, self.n):
            message = "best_of is not supported: every answer is returned"
            raise mismatch("best_of", message, "unsupported")
        is_batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        num_answers = (len(self.prompt) if is_batch else 1) * (self.n or 1)
        if num_answers > MAX_CHOICES:
            message = f"{num_answers} answers (prompts x n); at most {MAX_CHOICES}"
            raise mismatch(self.written("n"), message)
        return self


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody


class TokenizeRequest(Body):
    """A text; or a conversation with any other field of the chat route, which checks and reads it.

    `add_special_tokens` and `parse_special` are of texts.
    """

    prompt: str | None = None
    messages: list[JsonObject] | None = Field(default=None, min_length=1)
    tools: list[JsonObject] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Begin-of-sentence before a text. Default: true."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="End a conversation where the answer begins. Default: true."
    )
    parse_special: bool | None = Field(
        default=None, description="As the completion route has it; needs `prompt`."
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise mismatch("prompt", "give prompt or messages, one of them")
        if self.prompt is not None and self.tools is not None:
            raise mismatch("tools", "tools need messages")
        return self


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeReply(BaseModel):
    prompt: str
