"""The file that `rorqual generate --input-file` reads: a prompt or a request a line.

A line is what the server's chat or completion route takes, or a line of a batch; the server's own
reader (`serve/offline.py`) makes the prompt of it and says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import RorqualError, UsageError
from rorqual.files import NOT_JSON
from rorqual.log import console

if TYPE_CHECKING:
    from rorqual.engine import Output, SamplingParams
    from rorqual.engine.grammar import GrammarCompiler
    from rorqual.serve.offline import OfflineJob
    from rorqual.serve.settings import ServedModel

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"
OWN_KEYS = ("id", "custom_id")
"""Of a line that is no batch's: they go into its answer."""
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
BATCH_KEYS = ("url", "method", "body")
OFF = {"echo": False, "parse_special": False, "add_special_tokens": True, "best_of": 1}
"""What asks for nothing, of the fields that only completions have."""
NAMES_HINT = "A prompt has names of special tokens, which are text: --special reads them."
EXPECTED_LINE = (
    '{"prompt": "..."} or {"messages": [...]} with any other field of a request, or a line of a '
    'batch: {"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
)


@dataclass(frozen=True)
class Answer:
    """What became of a line: its text, and the line of the output."""

    item: dict[str, Any]
    texts: list[str]
    json_line: str


@dataclass(frozen=True)
class Line:
    """A line that can be answered. `batch_id` is the custom_id of a batch's line."""

    item: dict[str, Any]
    job: OfflineJob
    batch_id: str | None = None

    def answer(self, outputs: Sequence[Output]) -> Answer:
        from rorqual.serve.batch_lines import record_of

        reply = self.job.reply(outputs)
        texts = [
            output.text if "message" in choice else choice["text"]
            for choice, output in zip(reply["choices"], outputs, strict=True)
        ]
        if self.batch_id is not None:
            ignored = self.job.body.notes.ignored
            record = record_of(self.batch_id, 200, json.dumps(reply), ignored)
            return Answer(self.item, texts, record.decode().rstrip("\n"))
        return Answer(self.item, texts, _json(self.item | _fields(reply, texts)))


@dataclass(frozen=True)
class Reader:
    """From lines to requests. `is_plain`: each is a prompt, whatever the file's name."""

    model: ServedModel
    is_chat: bool
    system: str | None = None
    is_plain: bool = False
    reads_special: bool = False
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.reads_special and self.is_chat:
            raise UsageError("--special reads raw prompts only", fix="add --raw")
        if self.system is not None and not self.is_chat:
            raise UsageError("a raw prompt has no system text", fix="leave out --system or --raw")

    def check(self, path: Path) -> int:
        """The number of lines; the first that cannot be answered raises, with its place."""
        num_lines = sum(1 for _ in self.lines(path))
        if num_lines == 0:
            raise UsageError("has no prompts", where=path)
        return num_lines

    def lines(self, path: Path) -> Iterator[Line]:
        """Each that is not blank; UsageError with its place for one that cannot be answered."""
        from rorqual.engine.grammar import GrammarCompiler
        from rorqual.engine.grammar_trial import GrammarTrial

        trial = GrammarTrial(self.model.tokenizer)
        grammars = GrammarCompiler(self.model.tokenizer, trial=trial)
        num_requests = 0
        ids: set[bytes] = set()
        try:
            for place, text in _texts(path):
                if self.is_plain or path.suffix != ".jsonl":
                    item = {"prompt": text.strip() if self.is_plain else text}
                else:
                    item = _item(text, place)
                line = self.line(item, grammars, place, offset=num_requests, ids=ids)
                num_requests += len(line.job.requests)
                yield line
        finally:
            trial.close()

    def one(self, prompt: str) -> Line:
        """A prompt that is in no file."""
        from rorqual.engine.grammar import GrammarCompiler

        line = self.line({"prompt": prompt}, GrammarCompiler(self.model.tokenizer))
        return replace(line, item={})

    def line(
        self,
        item: dict[str, Any],
        grammars: GrammarCompiler,
        place: str | None = None,
        *,
        offset: int = 0,
        ids: set[bytes] | None = None,
    ) -> Line:
        """`offset` is added to a seed that the line does not name itself."""
        from rorqual.serve.errors import ApiError
        from rorqual.serve.offline import offline_job, read_body

        batch_id = _batch_id(item, place, set() if ids is None else ids)
        route, fields = self._request(item, place) if batch_id is None else _posted(item)
        try:
            body = read_body(route, fields)
            if body.stream and batch_id is not None:
                raise ApiError(422, "a batch cannot stream", code="unsupported", param="stream")
            if body.stream:
                body.notes.ignore("stream")
            if body.model not in (None, *self.model.names):
                body.notes.ignore("model")  # --model says which
            model = replace(self.model, defaults=_offset(self.model.defaults, offset))
            job = offline_job(body, model, grammars, self.system)
        except ApiError as problem:
            raise UsageError(f"cannot be answered: {problem.message}", where=place) from None
        except RorqualError as problem:
            reason = f"{problem.where}: {problem.what}" if problem.where else problem.what
            raise UsageError(
                f"cannot be answered: {reason}",
                where=place,
                found=problem.found,
                expected=problem.expected,
                fix=problem.fix,
            ) from None
        self._tell(job, place)
        return Line(item, job, batch_id)

    def _request(self, item: dict[str, Any], place: str | None) -> tuple[str, dict[str, Any]]:
        """The route that reads such a line, and what it gets."""
        fields = {name: value for name, value in item.items() if name not in OWN_KEYS}
        if "messages" in fields:
            if not self.is_chat:
                raise UsageError(
                    "has messages, which --raw cannot take", where=place, fix="use --chat"
                )
            return CHAT, fields
        if not self.is_chat:
            return COMPLETIONS, {"parse_special": self.reads_special or None} | fields
        prompt = fields.pop("prompt")
        if not isinstance(prompt, str):
            raise UsageError(
                "'prompt' is not a string",
                where=place,
                expected="one text, which is a message to the model",
                fix="add --raw for texts to be continued",
            )
        beyond = sorted(_completions_only() & set(fields))
        if beyond := [name for name in beyond if fields.pop(name) not in (None, OFF.get(name))]:
            raise UsageError(
                f"{beyond[0]!r} does not go with a prompt that is a message",
                where=place,
                fix="add --raw for texts to be continued, or leave it out",
            )
        return CHAT, {"messages": [{"role": "user", "content": prompt}]} | fields

    def _tell(self, job: OfflineJob, place: str | None) -> None:
        """What had no effect, each name once."""
        from rorqual.serve.prompts import NAMES_NOTE

        notes = job.body.notes
        texts = [NAMES_HINT if text == NAMES_NOTE else text for text in notes.texts]
        if names := [name for name in notes.ignored if name not in self._told]:
            texts.append(f"fields without effect: {', '.join(names)}")
        for text in texts:
            if text not in self._told:
                shown = text if place is None or text == NAMES_HINT else f"{place}: {text}"
                console().print(shown, markup=False, highlight=False, soft_wrap=True)
        self._told.update(texts, names)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each line that is not blank; UsageError for one that is no UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as problem:
                raise UsageError(f"is not UTF-8: {problem}", where=place) from None
            if text.strip():
                yield place, text


def _item(text: str, place: str) -> dict[str, Any]:
    try:
        item = json.loads(text)
    except NOT_JSON as problem:
        raise UsageError(
            f"is not valid JSON: {problem}", where=place, expected=EXPECTED_LINE
        ) from None
    is_batch = isinstance(item, dict) and any(name in item for name in BATCH_KEYS)
    if not isinstance(item, dict) or (("prompt" in item) == ("messages" in item) and not is_batch):
        raise UsageError("is not one prompt", where=place, found=text[:80], expected=EXPECTED_LINE)
    return item


def _batch_id(item: dict[str, Any], place: str | None, ids: set[bytes]) -> str | None:
    """A batch line's own; None for another line. `ids` are digests of those before it."""
    from rorqual.serve.batch_lines import fault_of
    from rorqual.serve.offline import SCHEMAS

    if not any(name in item for name in BATCH_KEYS):
        return None
    url = item.get("url", CHAT)
    if isinstance(url, str) and url not in (*SCHEMAS, RESPONSES):
        raise UsageError(
            "cannot be answered: there is no such url",
            where=place,
            found=url[:80],
            expected=" or ".join(SCHEMAS),
        )
    raw = json.dumps(item).encode()
    fault = fault_of(raw, item.get("url", CHAT), ids, len(raw), len(raw))
    if fault is not None:
        raise UsageError(f"cannot be answered: {fault.message}", where=place)
    if item["url"] not in SCHEMAS:
        raise UsageError(
            f"cannot be answered: {item['url']} keeps its responses, which only a server does",
            where=place,
            expected=" or ".join(SCHEMAS),
            fix="write the body as one of these has it, or send the file to `rorqual serve`",
        )
    return str(item["custom_id"])


def _posted(item: dict[str, Any]) -> tuple[str, Any]:
    return item["url"], item["body"]


def _completions_only() -> set[str]:
    from rorqual.serve.offline import SCHEMAS

    return set(SCHEMAS[COMPLETIONS].model_fields) - set(SCHEMAS[CHAT].model_fields)


def _offset(params: SamplingParams, offset: int) -> SamplingParams:
    from rorqual.engine import MAX_SEED

    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + offset) % (MAX_SEED + 1))


def _fields(reply: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """What is added to a line: of the first answer; all choices, if there is more to them."""
    first, usage = reply["choices"][0], reply["usage"]
    fields = {
        "text": texts[0],
        "finish_reason": first["finish_reason"],
        "usage": {name: usage[name] for name in COUNTS},
    }
    message = first.get("message", {})
    if {"reasoning_content", "tool_calls"} & set(message):
        fields |= {name: value for name, value in message.items() if name != "role"}
    if len(texts) > 1 or first.get("logprobs") is not None:
        fields["choices"] = reply["choices"]
    return fields


def _json(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as in an "id", is no text: escaped again
        text = json.dumps(value)
    return text
