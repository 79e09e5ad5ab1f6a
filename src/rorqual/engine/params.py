"""How one answer is sampled and where it ends: settings that travel with each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType

from rorqual.engine.grammar import Grammar
from rorqual.errors import UsageError

DEFAULT_MAX_TOKENS = 4096
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
WHOLE_NUMBERS = (
    "top_k",
    "seed",
    "max_tokens",
    "min_tokens",
    "max_thinking_tokens",
    "logprobs",
    "prompt_logprobs",
)
OPTIONAL = (
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_thinking_tokens",
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
    "grammar",
)
SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
BAN = -100.0
"""The `logit_bias` that takes a token out."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is sampled and where it ends; UsageError for a value without meaning.

    Temperature 0 takes the likeliest token. What changes the logits comes first, in this order:
    `grammar` leaves the tokens that may go on; `repetition_penalty` divides positive logits of
    tokens in the prompt or the answer and multiplies negative ones (CTRL, arXiv 1909.05858);
    `frequency_penalty` times the count of a token in the answer, and `presence_penalty` once, are
    subtracted (OpenAI); `logit_bias` is added, and -100 bans unless nothing else is left;
    `allowed_token_ids` bans all others in the same way (also the end, if it is not among them).
    Then the temperature, and the filters, each on what the one before left: the `top_k` likeliest,
    the fewest whose probabilities reach `top_p`, those with at least `min_p` times the likeliest's.

    `logprobs` asks for each token's log-probability and that many alternatives, `prompt_logprobs`
    for the prompt's. `stop` strings end the answer and are not part of it, unless
    `include_stop_str_in_output` asks for them and for the end's own token. It also ends at the
    end-of-sentence id (unless `ignore_eos`), at one of `stop_token_ids`, after `max_tokens`, and
    where the context is full. Its first `min_tokens` tokens are no end, unless a grammar leaves
    nothing else, and no stop string begins in them. `skip_special_tokens` leaves the names of
    tokens that begin, end and fill texts out of the answer's. With a grammar its shortest end comes
    in time, if there is one. After `max_thinking_tokens` tokens of reasoning comes `</think>`.
    """

    temperature: float = 0.3  # the model's advised temperature (DeepSeek-V3 README)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    max_thinking_tokens: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._check_types()
        # Comparisons are written so that NaN fails them.
        _check("temperature", self.temperature, "0 to 100", 0 <= self.temperature <= 100)
        if self.top_p is not None:
            _check("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1)
        if self.top_k is not None:
            _check("top_k", self.top_k, "1 or more", self.top_k >= 1)
        if self.min_p is not None:
            _check("min_p", self.min_p, "0 to 1", 0 <= self.min_p <= 1)
        self._check_penalties()
        if self.seed is not None:
            _check("seed", self.seed, "0 to 2^63 - 1", 0 <= self.seed <= MAX_SEED)
        _check("max_tokens", self.max_tokens, "1 or more", self.max_tokens >= 1)
        is_short = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, f"0 to max_tokens, {self.max_tokens}", is_short)
        if self.max_thinking_tokens is not None:
            number = self.max_thinking_tokens
            _check("max_thinking_tokens", number, "0 or more", number >= 0)
        _check("stop", self.stop, "strings that are not empty", all(self.stop))
        is_open = self.allowed_token_ids is None or len(self.allowed_token_ids) > 0
        _check("allowed_token_ids", self.allowed_token_ids, "at least one token id", is_open)
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None:
                _check(name, number, f"0 to {MAX_LOGPROBS}", 0 <= number <= MAX_LOGPROBS)
        if self.grammar is not None and self.ignore_eos:
            raise UsageError(
                "ignore_eos has no meaning with a grammar",
                expected="an answer that ends where its grammar does",
                fix="leave out ignore_eos",
            )

    def _check_types(self) -> None:
        """Values from a form or a command line often come as texts; nothing is converted."""
        for names, kind, what in (
            (NUMBERS, Real, "a number"),
            (WHOLE_NUMBERS, Integral, "a whole number"),
            (SWITCHES, bool, "True or False"),
            (("logit_bias",), Mapping, "a dict of token ids and numbers"),
            (("grammar",), Grammar, "a Grammar"),
        ):
            for name in names:
                value = getattr(self, name)
                is_none = value is None and name in OPTIONAL
                is_bool = isinstance(value, bool) and kind is not bool  # True is an int to Python
                _check_type(name, value, what, is_none or (isinstance(value, kind) and not is_bool))
        _check_list("stop", self.stop, "a list of texts", 'stop=("END",) for one text')
        for text in self.stop:
            _check_type("stop", text, "a list of texts", isinstance(text, str))
        _check_list("stop_token_ids", self.stop_token_ids, "a list of ids", "stop_token_ids=(2,)")
        for token_id in self.stop_token_ids:
            _check_type("stop_token_ids", token_id, "a list of ids", _is_id(token_id))
        if (allowed := self.allowed_token_ids) is not None:
            _check_list("allowed_token_ids", allowed, "a list of ids", "allowed_token_ids=(2,)")
            _check_type("allowed_token_ids", allowed, "a list of ids", all(map(_is_id, allowed)))
        for token_id, bias in (self.logit_bias or {}).items():
            _check_type("logit_bias", token_id, "token ids as keys", _is_id(token_id))
            is_number = isinstance(bias, Real) and not isinstance(bias, bool)
            _check_type("logit_bias", bias, "numbers as values", is_number)

    def _check_penalties(self) -> None:
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, "0.01 to 100", 0.01 <= penalty <= 100)
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(name, value, "-2 to 2", -2 <= value <= 2)
        if self.logit_bias is None:
            return
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias", token_id, "token ids as keys", token_id >= 0)
            _check("logit_bias", bias, "-100 to 100", -100 <= bias <= 100)
        # A frozen dataclass allows this in __post_init__ only so; the caller's dict may change.
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were seen count."""
        return self.repetition_penalty != 1 or bool(self.frequency_penalty or self.presence_penalty)


def check_params(params: object) -> None:
    """UsageError for what is no SamplingParams, such as a list of them."""
    if not isinstance(params, SamplingParams):
        raise UsageError(
            "the sampling settings are no SamplingParams",
            found=type(params).__name__,
            expected="one SamplingParams, for all prompts",
            fix="where prompts differ in their settings, call generate once for each kind",
        )


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_list(name: str, value: object, expected: str, fix: str) -> None:
    """A text is a sequence of texts to Python, and means one of them here."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    _check_type(name, value, expected, is_list, fix)


def _check_type(
    name: str, value: object, expected: str, is_valid: bool, fix: str | None = None
) -> None:
    if not is_valid:
        found = f"{value!r:.80}, of type {type(value).__name__}"
        raise UsageError(f"{name} has the wrong type", found=found, expected=expected, fix=fix)


def _check(name: str, value: object, expected: str, is_valid: bool) -> None:
    if not is_valid:
        raise UsageError(f"{name} is out of range", found=repr(value), expected=expected)
