"""Constrained output: which tokens may follow, so that the answer fits a grammar.

llguidance does the parsing (Earley over regex derivatives). Choice: it and not xgrammar, for it is
one wheel of 7 MB without dependencies, and installing xgrammar asked for Triton (770 MB) on a CPU
machine; they were not timed. It is optional: without it, only a request with a grammar fails.

Special tokens are never text: no string or `.` of a grammar matches one. A grammar of the kind
"grammar" can ask for one by name (`<｜tool▁sep｜>`), outside its strings.
"""

# V vocabulary: the tokenizer's ids

from __future__ import annotations

import copy
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.grammar_trial import GrammarTrial, TrialExpiredError
from rorqual.engine.shortest import required_names
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_TEXT_CHARS = 262_144
MAX_DEPTH = 64
"""Of brackets. The library recurses along brackets, rules and references, and where the stack ends
it takes the process with it (seen with a chain of 3,000 rules or `$ref`s in 8 MB of stack)."""
MAX_RULES = 512
"""Rules of a grammar, and `$ref`s of a schema."""
MAX_PATTERNS = 32
"""Patterns of properties in a schema: each is compared with each (100 took a second)."""
MAX_MULTIPLE = 100_000
"""Of `multipleOf`, whose automaton has a state for each remainder."""
MAX_OPTIONAL = 400
"""Properties of one object that may be left out: after each any later one may follow, and of what
may follow the library takes 2,000 items, four for each.
"""
MAX_CACHED = 32
MAX_CACHED_CHARS = 4 * MAX_TEXT_CHARS
"""Of all texts in the cache: what a grammar takes grows with its text."""
MAX_REASON_CHARS = 500
TRANSLATED = "// translated"  # ends a grammar from another notation: errors name no line of it
_INNER = r"(?m)^[ \t]*(?:\d+ \|.*|\^+)[ \t]*$|<non-verbose/>|\bNoExtension(?:Bias)?\b"
"""Pictures of a place, and the library's names of its states: errors are one line."""
LIMITS: dict[str, Any] = {
    "max_lexer_states": 20_000,  # 1 to 2 kB each, so that a grammar takes 40 MB at most
    "initial_lexer_fuel": 300_000,  # the library's 1,000,000 may take seconds to run out
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # texts of users stay out of messages to others
}

JSON_OPTIONS = {
    # Choice: no white space between the marks. A weak model fills its answer with it: it was 70 %
    # of what the bundled model wrote.
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    # Nothing is dropped in silence: a keyword that would not be enforced is an error.
    "lenient": False,
    "coerce_one_of": False,
}
CALL_OPTIONS = JSON_OPTIONS | {"item_separator": ", ?", "key_separator": ": ?"}
"""Of a tool's arguments: models have learnt them with a space after each mark."""
WIDE_OPTIONS = JSON_OPTIONS | {
    # At most 40 characters in one place: a deeply indented line has as many.
    "whitespace_flexible": True,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}",
}
"""For whoever asks for white space."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like; `text` depends on the kind.

    json_object: any object, no text. json_schema: the schema as JSON. regex: Rust's syntax, to be
    matched whole; its digits are those of every script. choice: a JSON list of strings. grammar:
    llguidance's Lark dialect. JSON is compact unless `has_whitespace`.
    """

    kind: GrammarKind
    text: str = ""
    has_whitespace: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            kinds = ", ".join(get_args(GrammarKind))
            raise UsageError("unknown kind of grammar", found=repr(self.kind), expected=kinds)


class GrammarCompiler:
    """Makes matchers for one tokenizer; keeps the last `max_entries` grammars, and of those that
    cannot be used what is wrong with them.

    Threads may share it: one that wants a grammar which another is compiling waits for it. It costs
    nothing until the first grammar comes, or `warm_up`. A `trial` is for grammars of strangers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_entries: int = MAX_CACHED,
        trial: GrammarTrial | None = None,
    ) -> None:
        self._tokenizer, self._max_entries, self.trial = tokenizer, max_entries, trial
        self._lock = threading.Lock()
        self._ll_tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """UsageError saying what is wrong with the text."""
        with self._lock:
            entry = self._compiled.get(grammar)
            is_new = entry is None
            if entry is None:
                entry = self._compiled[grammar] = Future()
                self._forget_oldest()
            self._compiled.move_to_end(grammar)
        if is_new:
            self._fill(entry, grammar)
        return _result(entry)

    def known(self, grammar: Grammar) -> CompiledGrammar | None:
        """As `compile`, but None for one that is not in the cache."""
        with self._lock:
            entry = self._compiled.get(grammar)
        return None if entry is None or not entry.done() else _result(entry)

    def _fill(self, entry: Future[CompiledGrammar], grammar: Grammar) -> None:
        try:
            first = self._compile(grammar)
            entry.set_result(
                CompiledGrammar(first, self._tokenizer, required_names(_schemas(grammar)))
            )
        except BaseException as problem:  # noqa: BLE001  whoever waits must not wait for ever
            is_usage = isinstance(problem, UsageError)
            is_lasting = is_usage and not isinstance(problem, TrialExpiredError)
            with self._lock:
                if not is_lasting and self._compiled.get(grammar) is entry:
                    del self._compiled[grammar]
            entry.set_exception(problem)

    def _forget_oldest(self) -> None:
        num_chars = sum(len(grammar.text) for grammar in self._compiled)
        while len(self._compiled) > 1 and (
            len(self._compiled) > self._max_entries or num_chars > MAX_CACHED_CHARS
        ):
            oldest, _ = self._compiled.popitem(last=False)
            num_chars -= len(oldest.text)

    def warm_up(self) -> None:
        """Builds what the first grammar would have to wait for; nothing without the library."""
        with suppress(UsageError):
            self._tokens()

    def _tokens(self) -> llguidance.LLTokenizer:
        """The library's trie of all tokens; UsageError without the library."""
        library = _library()
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = library.LLTokenizer(_Vocabulary(self._tokenizer))
            return self._ll_tokenizer

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        llguidance, tokens = _library(), self._tokens()
        _check_size(grammar)
        limits = llguidance.LLParserLimits(**LIMITS)
        try:
            text = _library_text(grammar, llguidance.LLMatcher)
        except ValueError as problem:
            raise _malformed(grammar, str(problem)) from None
        if self.trial is not None and (fault := self.trial.run(text, LIMITS)) is not None:
            raise _malformed(grammar, fault)
        matcher = llguidance.LLMatcher(tokens, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise _malformed(grammar, matcher.get_error())
        probe = matcher.deep_copy()
        if not any(probe.compute_bitmask()) or probe.is_error():
            raise _malformed(grammar, f"it matches no text. {probe.get_error()}")
        return matcher


class CompiledGrammar:
    """A grammar that is ready for answers, and its `required_names`. Threads may share it."""

    def __init__(
        self, first: llguidance.LLMatcher, tokenizer: Tokenizer, names: frozenset[bytes]
    ) -> None:
        self._first, self._tokenizer, self.names = first, tokenizer, names
        self._lock = threading.Lock()

    def matcher(self) -> GrammarMatcher:
        """One at the grammar's beginning."""
        with self._lock:
            return GrammarMatcher(self._first.deep_copy(), self._tokenizer)


def _result(entry: Future[CompiledGrammar]) -> CompiledGrammar:
    try:
        return entry.result()
    except UsageError as problem:  # each who asks gets an error of its own
        raise copy.copy(problem).with_traceback(None) from None


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._eos_id, self._vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        self.failure: str | None = None  # why it had to give up: the grammar became too complex

    @property
    def state(self) -> llguidance.LLMatcher:
        """The library's own, to be copied and not to be moved."""
        return self._matcher

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next; end-of-sentence where the text may end.

        There is always one: end-of-sentence alone where the text must end, or after a failure.
        """
        allowed_V = np.zeros(self._vocab_size, dtype=np.uint8)
        if self.failure is None:
            bits = self._matcher.compute_bitmask()
            if not self._note_failure():
                all_V = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
                allowed_V[:] = all_V[: self._vocab_size]
        if self.failure is not None or not allowed_V.any():
            self.failure = self.failure or "no token can go on from here"
            allowed_V[self._eos_id] = 1
        return torch.from_numpy(allowed_V).bool()

    def put(self, token_id: int) -> None:
        """Takes the next token, which must be an allowed one and not the end."""
        if self.failure is None and not self._matcher.consume_token(token_id):
            self._note_failure()

    def rollback(self, num_tokens: int) -> None:
        """Forgets the last tokens."""
        is_done = self._matcher.rollback(num_tokens)
        assert is_done, f"cannot forget {num_tokens} tokens: {self._matcher.get_error()}"

    def num_possible(self, token_ids: Sequence[int]) -> int:
        """How many of these could come next, one after the other."""
        if self.failure is not None:
            return 0
        return self._matcher.validate_tokens(list(token_ids))

    def _note_failure(self) -> bool:
        if self._matcher.is_error():
            self.failure = self._matcher.get_error()
        return self.failure is not None


class _Vocabulary:
    """A tokenizer in the shape that llguidance reads: bytes of each id, and which are special."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = list(tokenizer.token_bytes)
        self.special_token_ids = sorted(tokenizer.special_ids.values())

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(text)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "constrained output needs the package llguidance",
            found="it is not installed",
            fix="pip install 'rorqual[serve]'",
        ) from None
    return llguidance


def _library_text(grammar: Grammar, matcher: type[llguidance.LLMatcher]) -> str:
    """What llguidance takes; ValueError saying what is wrong."""
    options: Any = WIDE_OPTIONS if grammar.has_whitespace else JSON_OPTIONS
    if grammar.kind == "json_object":
        return matcher.grammar_from_json_schema('{"type": "object"}', overrides=options)
    if grammar.kind == "json_schema":
        _check_schema(_parse_json(grammar.text))
        return matcher.grammar_from_json_schema(grammar.text, overrides=options)
    if grammar.kind == "regex":
        return matcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        choices = _parse_json(grammar.text)
        is_texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        if not is_texts or not choices:
            raise ValueError("a choice is a JSON list of strings that are not empty")
        return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))
    _check_schema([*_inline_schemas(grammar.text)])
    return matcher.grammar_from_lark(grammar.text)


def _schemas(grammar: Grammar) -> list[Any]:
    if grammar.kind == "json_schema":
        return [json.loads(grammar.text)]
    return [*_inline_schemas(grammar.text)] if grammar.kind == "grammar" else []


def _inline_schemas(text: str) -> Iterator[Any]:
    """The schemas that a grammar has after `%json`."""
    for mark in re.finditer(r"%json\s*", text):
        try:
            yield json.JSONDecoder().raw_decode(text, mark.end())[0]
        except json.JSONDecodeError as problem:
            raise ValueError(f"not JSON after %json: {problem}") from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON: {problem}") from None


def _check_size(grammar: Grammar) -> None:
    """UsageError for a text that would take the library too long, or too deep."""
    text = grammar.text
    depth = deepest = 0
    for bracket in re.findall(r"\\.|[()\[\]{}]", text, re.DOTALL):
        depth += bracket in "([{"
        depth -= bracket in ")]}"
        deepest = max(deepest, depth)
    _check_at_most("characters", len(text), MAX_TEXT_CHARS)
    _check_at_most("brackets inside each other", deepest, MAX_DEPTH)
    if grammar.kind == "grammar":
        num_rules = len(re.findall(r"^[ \t]*[?!A-Za-z_][^\n]*?:", text, re.MULTILINE))
        _check_at_most("rules", num_rules, MAX_RULES)


def _check_schema(schema: Any) -> None:
    """As `_check_size`, for what only the parsed schema tells."""
    num_references = num_patterns = 0
    values = [schema]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            _check_optional(value)
            num_references += "$ref" in value
            patterns = value.get("patternProperties")
            num_patterns += len(patterns) if isinstance(patterns, dict) else 0
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float):
                _check_at_most("as multipleOf", multiple, MAX_MULTIPLE)
            values += value.values()
        elif isinstance(value, list):
            values += value
    _check_at_most("times $ref", num_references, MAX_RULES)
    _check_at_most("patternProperties", num_patterns, MAX_PATTERNS)


def _check_optional(schema: dict[str, Any]) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and len(properties) > MAX_OPTIONAL:
        names = {n for n in required if isinstance(n, str)} if isinstance(required, list) else set()
        num_optional = len(properties.keys() - names)
        _check_at_most("properties of an object that may be left out", num_optional, MAX_OPTIONAL)


def _check_at_most(what: str, number: float, most: int) -> None:
    if number > most:
        raise UsageError(
            "the grammar is too large", found=f"{number} {what}", expected=f"at most {most}"
        )


def _malformed(grammar: Grammar, problem: str) -> UsageError:
    inner = rf"{_INNER}|^at \d+\(\d+\): " if grammar.text.endswith(TRANSLATED) else _INNER
    reason = " ".join(re.sub(inner, "", problem).split()).removesuffix(".")
    return UsageError(f"the {grammar.kind} cannot be used: {reason[:MAX_REASON_CHARS]}")
