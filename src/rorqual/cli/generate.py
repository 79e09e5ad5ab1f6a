"""`rorqual generate`: one prompt, a file of prompts, or one after the other at the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.answer_file import AnswerFile
from rorqual.cli.chat import (
    DeviceName,
    DtypeName,
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    Threads,
    TokenizerPath,
    TopK,
    TopP,
    converse,
    loading,
    opening,
    set_threads,
)
from rorqual.errors import RorqualError, UsageError
from rorqual.files import NOT_JSON
from rorqual.log import console

if TYPE_CHECKING:
    from rorqual.engine import Engine, Output, SamplingParams
    from rorqual.tokenizer import Tokenizer

LINE_KEYS = ("prompt", "messages", "tools", "id")
NAMES_SPECIAL = "A prompt has names of special tokens, which are text: --special reads them."
EXPECTED_LINE = '{"prompt": "..."} or {"messages": [...]}, optionally with "tools" and "id"'


def generate(
    model: Model = "tiny",
    tokenizer: TokenizerPath = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: .txt, one a line, or .jsonl (see above)."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option(metavar="G.jsonl", help="Where the answers to --input-file go.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from the terminal or a pipe.")
    ] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    system: System = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Prompts are messages, or plain text to be continued. "
            "[default: chat if the model has a chat template]",
        ),
    ] = None,
    special: Annotated[
        bool,
        typer.Option(
            "--special", help="With --raw: <|User|> and the like in prompts are special tokens."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run side by side.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    threads: Threads = None,
) -> None:
    """Continue prompts: one, a file of any length, or one after the other.

    A line of a .jsonl file is {"prompt": "..."} or {"messages": [...]}, with "tools" and "id" if
    you like. Every line is checked before anything is generated. While a file is being answered,
    the answers lie in G.jsonl.partial, which no later run removes; G.jsonl appears when all are
    there and replaces an older one.

    \b
    Examples:
      rorqual generate --prompt "What is 12 + 30?"
      rorqual generate --model DIR --raw --prompt "The whale" --stop "." --max-new-tokens 40
      rorqual generate --model DIR --raw --special --prompt "<|User|>Hello<|Assistant|>"
      rorqual generate --model DIR --input-file F.jsonl --output-file G.jsonl --temperature 0
      rorqual generate --model FILE.gguf --prompt "The whale"
    """
    sources = {"--prompt": prompt, "--input-file": input_file, "--interactive": interactive or None}
    check_sources(sources, output_file)
    if interactive and as_json:
        raise UsageError("--interactive prints text, not JSON", fix="leave out --json")
    if input_file is not None:
        check_input_file(input_file)
        _check_files(input_file, output_file)
    with AnswerFile.taken(output_file) as target:
        with loading(model):
            from rorqual.engine import Conversation, Engine, ModelFolder
            from rorqual.ops.device import resolve_device

            place = resolve_device(device)
            folder = ModelFolder.find(model, tokenizer)
            params = folder.sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=tuple(stop) if stop else None,
                max_tokens=max_new_tokens,
            )
            set_threads(threads)
            is_chat = folder.is_chat() if chat is None else chat
            reader = Reader(folder.load_tokenizer(), is_chat, system, reads_special=special)
            num_lines = 0
            if input_file is not None:  # before the weights: a fault in the last line shows at once
                num_lines = reader.check(input_file, folder.max_positions())
            loaded = folder.load_model(dtype, place)
            engine = Engine(loaded, reader.tokenizer, max_batch=batch_size)
        if interactive:
            talk = Conversation(engine, params, system, is_raw=not is_chat, reads_special=special)
            converse(talk, opening(folder))
        elif prompt is not None:
            _answer_one(engine, reader.prompt_ids({"prompt": prompt}), params, as_json)
        elif input_file is not None:
            batch = Batch(engine, reader, params, input_file, num_lines)
            batch.write(target) if target else batch.show(as_json)


def check_sources(sources: dict[str, Any], output_file: Path | None) -> None:
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "there is not one source of prompts",
            found=" and ".join(given) or "none",
            expected=f"one of {', '.join(sources)}",
        )
    if output_file is not None and "--input-file" not in given:
        raise UsageError("--output-file needs --input-file", fix="redirect the output with >")


def check_input_file(path: Path) -> None:
    """UsageError for what is no file that can be read twice: checked first, then answered."""
    if path.is_dir():
        raise UsageError(
            "is a folder", where=path, expected="a file of prompts", fix="name a file in it"
        )
    if not path.exists():
        raise UsageError(
            "no such file", where=path, expected="a file of prompts", fix="check the path"
        )
    if not path.is_file():
        raise UsageError(
            "is a pipe or a device, which cannot be read twice",
            where=path,
            expected="a file of prompts: all are checked before the first is answered",
            fix="write the prompts to a file, or pipe them into --interactive",
        )


def _check_files(input_file: Path, output_file: Path | None) -> None:
    if input_file.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            "unknown kind of file",
            where=input_file,
            expected=".txt (a prompt a line) or .jsonl",
            fix="convert the file, or give it the ending that fits",
        )
    if output_file is None:
        return
    is_itself = output_file.resolve() == input_file.resolve()
    if is_itself or (output_file.exists() and not output_file.is_file()):
        kind = "the input file itself" if is_itself else "a folder or a device"
        raise UsageError(
            f"the output would replace {kind}",
            where=output_file,
            fix="name a new file with --output-file",
        )
    if not output_file.parent.is_dir():
        is_file = output_file.parent.exists()
        raise UsageError(
            "is a file, no folder" if is_file else "no such folder",
            where=output_file.parent,
            fix="correct --output-file" if is_file else "create it first",
        )


@dataclass(frozen=True)
class Reader:
    """From lines of a prompt file to token ids. `is_plain`: each is a prompt, whatever the name."""

    tokenizer: Tokenizer
    is_chat: bool
    system: str | None
    is_plain: bool = False
    reads_special: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.reads_special and self.is_chat:
            raise UsageError("--special reads raw prompts only", fix="add --raw")
        if self.system is not None and not self.is_chat:
            raise UsageError("a raw prompt has no system text", fix="leave out --system or --raw")

    def check(self, path: Path, max_positions: int) -> int:
        """The number of lines; the first that cannot be answered raises, with its place."""
        from rorqual.engine import check_prompt

        num_lines = 0
        for place, item in self.items(path):
            try:
                check_prompt(self.prompt_ids(item), self.tokenizer.vocab_size, max_positions)
            except RorqualError as problem:
                raise UsageError(f"cannot be answered: {problem}", where=place) from None
            num_lines += 1
        if num_lines == 0:
            raise UsageError("has no prompts", where=path)
        return num_lines

    def items(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, object) of each line that is not blank; UsageError for one of a wrong shape."""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as problem:
                    raise UsageError(f"is not UTF-8: {problem}", where=place) from None
                if not text.strip():
                    continue
                if self.is_plain:
                    yield place, {"prompt": text.strip()}
                else:
                    is_json = path.suffix == ".jsonl"
                    yield place, self._item(text, place) if is_json else {"prompt": text}

    def prompt_ids(self, item: dict[str, Any]) -> list[int]:
        if not self.is_chat:
            self._note_special(item["prompt"])
            return self.tokenizer.encode_raw(item["prompt"], reads_special=self.reads_special)
        messages = item.get("messages")
        if messages is None:
            messages = [{"role": "user", "content": item["prompt"]}]
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.tokenizer.encode_chat(messages, item.get("tools"))

    def _note_special(self, text: str) -> None:
        """Says once that names of special tokens are read as text."""
        if self.reads_special or self.notes or not self.tokenizer.names_special(text):
            return
        self.notes.append(NAMES_SPECIAL)
        console().print(NAMES_SPECIAL, markup=False, highlight=False, soft_wrap=True)

    def _item(self, text: str, place: str) -> dict[str, Any]:
        try:
            item = json.loads(text)
        except NOT_JSON as problem:
            raise UsageError(
                f"is not valid JSON: {problem}", where=place, expected=EXPECTED_LINE
            ) from None
        if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
            raise UsageError(
                "is not one prompt", where=place, found=text[:80], expected=EXPECTED_LINE
            )
        unknown = sorted(set(item) - set(LINE_KEYS))
        if unknown:
            raise UsageError(
                f"unknown keys {', '.join(unknown)}", where=place, expected=EXPECTED_LINE
            )
        if not isinstance(item.get("prompt", ""), str):
            raise UsageError("'prompt' is not a string", where=place)
        if not isinstance(item.get("messages", []), list):
            raise UsageError("'messages' is not a list", where=place)
        if not self.is_chat and "messages" in item:
            raise UsageError("has messages, which --raw cannot take", where=place, fix="use --chat")
        return item


@dataclass(frozen=True)
class Batch:
    """A checked prompt file on its way through the engine."""

    engine: Engine
    reader: Reader
    params: SamplingParams
    input_file: Path
    num_lines: int

    def show(self, as_json: bool) -> None:
        """Answers to standard output, in the order of the lines."""
        for answer in self.answers():
            print(_json(answer) if as_json else answer["text"], flush=True)

    def write(self, target: AnswerFile) -> None:
        target.write((_json(answer) for answer in self.answers()), self.num_lines)

    def answers(self) -> Iterator[dict[str, Any]]:
        """The file is read again as rows come free, so its length costs no memory."""
        from rich.progress import track

        from rorqual.engine import seeded

        items = (item for _, item in self.reader.items(self.input_file))
        prompts = (self.reader.prompt_ids(item) for item in items)
        outputs = self.engine.generate_each(seeded(prompts, self.params))
        lines = self.reader.items(self.input_file)
        bar = track(
            zip(lines, outputs, strict=True),
            "generating",
            total=self.num_lines,
            console=console(),
            disable=not console().is_terminal,
        )
        for (_, item), output in bar:
            yield item | _fields(output)


def _answer_one(
    engine: Engine, prompt_ids: list[int], params: SamplingParams, as_json: bool
) -> None:
    """Streams the text, or prints the whole as JSON."""
    stream = engine.stream(prompt_ids, params)
    for piece in stream:
        if not as_json:
            print(piece, end="", flush=True)
    print(_json(_fields(stream.output)) if as_json else "", flush=True)


def _fields(output: Output) -> dict[str, Any]:
    return {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "usage": {
            "prompt_tokens": output.num_prompt_tokens,
            "completion_tokens": len(output.token_ids),
        },
    }


def _json(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as in an "id", is no text: escaped again
        text = json.dumps(value)
    return text
