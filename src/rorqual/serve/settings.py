"""What the operator chooses: limits, keys, origins, where files lie; and what model is served."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from rorqual.config import settings
from rorqual.engine import SamplingParams, check_prompt
from rorqual.errors import RorqualError
from rorqual.serve.errors import ApiError, describe
from rorqual.serve.json_values import MAX_VALUES
from rorqual.serve.model_facts import ModelFacts
from rorqual.tokenizer import Tokenizer

MIB = 2**20


@settings
class ServerSettings:
    """Limits of the HTTP side; `rorqual serve --set server.NAME=VALUE` changes one."""

    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    """Names under which a server without keys answers, beside `localhost` and addresses."""
    is_loopback: bool = True
    """Bound to this machine only: without a key, other addresses are then no names of it."""
    has_strict_fields: bool = False
    """Whether a field that nobody documents is an error; else it is ignored, and named."""
    max_connections: int = Field(default=1024, gt=0)
    head_timeout_seconds: float = Field(default=20.0, gt=0)
    """From a connection's first byte, or from its beginning, to the end of a request's headers."""
    idle_seconds: float = Field(default=30.0, gt=0)
    """How long a connection is kept for a next request."""
    max_body_bytes: int = Field(default=4 * MIB, gt=0)
    max_concurrent_requests: int = Field(default=512, gt=0)
    body_timeout_seconds: float = Field(default=30.0, gt=0)
    request_timeout_seconds: float | None = Field(default=None, gt=0)
    """From a request's start to its last token; None: as long as it takes."""
    keep_alive_seconds: float = Field(default=10.0, gt=0)
    """Silence after which a waiting client gets a comment (stream) or an empty line."""
    stall_seconds: float = Field(default=60.0, gt=0)
    """How long a client may leave what was sent unread before its answer is given up."""
    drain_timeout_seconds: float = Field(default=60.0, ge=0)
    last_call_seconds: float = Field(default=1.0, ge=0)
    """At the end of a drain: how long who is connected and has not asked yet may still ask."""
    failed_seconds: float = Field(default=5.0, ge=0)
    """How long a server whose engine has failed still says so before it ends."""
    retry_after_seconds: int = Field(default=2, ge=0)
    state_dir: Path | None = None
    """Files, batches and responses; None: a temporary folder, which goes with the server."""
    max_file_bytes: int = Field(default=64 * MIB, gt=0)
    max_stored_bytes: int = Field(default=1024 * MIB, gt=0)
    max_files: int = Field(default=1000, gt=0)
    batch_concurrency: int = Field(default=8, gt=0)
    max_stored_responses: int = Field(default=10_000, gt=0)
    max_stored_response_bytes: int = Field(default=1024 * MIB, gt=0)
    response_seconds: int = Field(default=30 * 24 * 3600, gt=0)
    """How long a stored response lasts."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the routes know of the model: its names, its tokenizer, its own sampling advice, and
    the device that it runs on.
    """

    name: str
    tokenizer: Tokenizer
    max_positions: int
    defaults: SamplingParams = field(default_factory=SamplingParams)
    aliases: tuple[str, ...] = ()
    device: str = "cpu"
    created: int = field(default_factory=lambda: int(time.time()))
    facts: ModelFacts = field(default_factory=ModelFacts)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def max_values(self) -> int:
        """Of a body: room for a prompt of ids."""
        return max(MAX_VALUES, 2 * self.max_positions)

    def check_prompt(self, prompt_ids: Sequence[int], param: str) -> None:
        """ApiError 400 for a prompt that cannot be answered."""
        try:
            check_prompt(prompt_ids, self.tokenizer.vocab_size, self.max_positions)
        except RorqualError as problem:
            is_long = len(prompt_ids) >= self.max_positions
            code = "context_length_exceeded" if is_long else "invalid_prompt"
            raise ApiError(400, describe(problem), code=code, param=param) from None

    def check_length(self, num_chars: int, param: str) -> None:
        """ApiError 400 for a text that cannot fit, however it is tokenised. What may be left out of
        the prompt, such as white space, is not to be counted.
        """
        least = -(-num_chars // self.tokenizer.longest_token)
        if least >= self.max_positions:
            message = (
                f"the prompt does not fit the model's context (found {num_chars} characters, which "
                f"are at least {least} tokens; expected at most {self.max_positions - 1})"
            )
            raise ApiError(400, message, code="context_length_exceeded", param=param)
