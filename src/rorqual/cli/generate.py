"""`rorqual generate`: one prompt, a file of prompts, or one after the other at the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.answer_file import AnswerFile
from rorqual.cli.engine_flags import EngineFlags, with_engine_flags
from rorqual.cli.options import (
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TokenizerPath,
    TopK,
    TopP,
    loading,
)
from rorqual.cli.request_lines import Answer, Line, Reader
from rorqual.cli.terminal import converse, opening, shown
from rorqual.errors import UsageError
from rorqual.log import console

if TYPE_CHECKING:
    from rorqual.engine import Engine, Output, Request


@with_engine_flags
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
    *,
    flags: EngineFlags,
) -> None:
    """Continue prompts: one, a file of any length, or one after the other.

    A line of a .jsonl file is {"prompt": "..."} or {"messages": [...]} with whatever else a request
    to the server may have (tools, temperature, response_format, n, ...), or a line of a batch
    ({"custom_id", "method", "url", "body"}). An answer is its line with "text", "finish_reason",
    "usage" and what else the model said; of a batch's line it is the batch's record. Every line is
    checked before anything is generated. While a file is being answered, the answers lie in
    G.jsonl.partial, which no later run removes; G.jsonl appears when all are there and replaces an
    older one.

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
            from rorqual.engine import Conversation, SamplingParams
            from rorqual.serve.settings import ServedModel
            from rorqual.weights import ModelFolder

            options = flags.options(max_batch=batch_size)
            folder = ModelFolder.find(model, tokenizer)
            params = SamplingParams(
                **folder.sampling(
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    seed=seed,
                    stop=tuple(stop) if stop else None,
                    max_tokens=max_new_tokens,
                )
            )
            is_chat = folder.is_chat() if chat is None else chat
            served = ServedModel(
                name=folder.name,
                tokenizer=folder.load_tokenizer(),
                max_positions=folder.max_positions(),
                defaults=params,
            )
            reader = Reader(served, is_chat, system, reads_special=special)
            num_lines = 0
            if input_file is not None:  # before the weights: a fault in the last line shows at once
                num_lines = reader.check(input_file)
            engine = flags.engine(folder, served.tokenizer, options)
        if interactive:
            talk = Conversation(engine, params, system, is_raw=not is_chat, reads_special=special)
            converse(talk, opening(folder))
        elif prompt is not None:
            _answer_one(engine, reader.one(prompt), as_json)
        elif input_file is not None:
            batch = Batch(engine, reader, input_file, num_lines)
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
class Batch:
    """A checked file of requests on its way through the engine."""

    engine: Engine
    reader: Reader
    input_file: Path
    num_lines: int

    def show(self, as_json: bool) -> None:
        """Answers to standard output, in the order of the lines."""
        for answer in self.answers():
            for text in [answer.json_line] if as_json else answer.texts:
                print(shown(text), flush=True)

    def write(self, target: AnswerFile) -> None:
        target.write((answer.json_line for answer in self.answers()), self.num_lines)

    def answers(self) -> Iterator[Answer]:
        """The file is read again as rows come free, so its length costs no memory."""
        from rich.progress import track

        yield from track(
            self._answers(),
            "generating",
            total=self.num_lines,
            console=console(),
            disable=not console().is_terminal,
        )

    def _answers(self) -> Iterator[Answer]:
        begun: deque[Line] = deque()
        outputs: list[Output] = []
        for output in self.engine.generate_each(self._requests(begun)):
            outputs.append(output)
            if len(outputs) == len(begun[0].job.requests):
                yield begun.popleft().answer(outputs)
                outputs = []

    def _requests(self, begun: deque[Line]) -> Iterator[Request]:
        """Those of all lines; `begun` gets each line with its first."""
        for line in self.reader.lines(self.input_file):
            begun.append(line)
            yield from line.job.requests


def _answer_one(engine: Engine, line: Line, as_json: bool) -> None:
    """Streams the text, or prints the whole as JSON."""
    [request] = line.job.requests
    stream = engine.stream(request.prompt_ids, request.params)
    for piece in stream:
        if not as_json:
            print(shown(piece), end="", flush=True)
    print(shown(line.answer([stream.output]).json_line) if as_json else "", flush=True)
