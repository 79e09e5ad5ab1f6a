"""`rorqual chat`: a conversation in the terminal, or over a pipe one message a line."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.errors import RorqualError, UsageError
from rorqual.log import console

if TYPE_CHECKING:
    from rorqual.engine import Conversation
    from rorqual.weights import ModelFolder

PROMPT = "> "
HELP = """\
/clear  forget the conversation and begin a new one
/exit   leave (so does Ctrl-D)
/help   show this
Ctrl-C stops an answer; at the prompt it clears the line."""
MAX_DRAFTS = 2
"""With an MTP module; the engine takes as many of these as pay."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="DIR|FILE",
        help="A Hugging Face folder, rank shards, a GGUF file, a run folder, or tiny (bundled).",
    ),
]
TokenizerPath = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR|FILE",
        help="A folder, tokenizer.json or GGUF file to take it from, or tiny (bundled). "
        "[default: the model's own]",
    ),
]
ADVICE = "[default: the model's advice, or {}]"
Temperature = Annotated[
    float | None,
    typer.Option(help=f"0 takes the likeliest token, at most 100. {ADVICE.format(0.3)}"),
]
TopP = Annotated[
    float | None,
    typer.Option(help=f"Sample among the likeliest that reach this sum. {ADVICE.format(1)}"),
]
TopK = Annotated[
    int | None,
    typer.Option(help=f"Sample among this many likeliest tokens. {ADVICE.format('all')}"),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample among tokens at least this share as likely as the likeliest. "
        + ADVICE.format(0)
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help=f"Above 1 makes tokens that were seen less likely. {ADVICE.format(1)}"),
]
Seed = Annotated[int | None, typer.Option(help="Makes the answers the same each time.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help=f"Longest answer. {ADVICE.format(4096)}")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions that come first.")]
DtypeName = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32 or bfloat16: what weights are decoded to, FP8 and GGUF's types too. "
        "Auto: float32 up to a billion parameters, bfloat16 beyond. stored: as they are in the "
        "file, decoded for each product (least memory, slow).",
    ),
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N. Auto: a GPU where torch sees one.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")]


def chat(
    model: Model = "tiny",
    tokenizer: TokenizerPath = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = None,
    system: System = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    threads: Threads = None,
) -> None:
    """Talk with a model in the terminal.

    With standard input piped, each line is a message of one conversation, the answers go to
    standard output, and the program ends with the input. /clear begins a new conversation.

    \b
    Examples:
      rorqual chat
      rorqual chat --model DIR --temperature 0
      rorqual chat --model DeepSeek-V3-Q4_K_M-00001-of-00009.gguf
      echo "What is 12 + 30?" | rorqual chat
    """
    with loading(model):
        from rorqual.engine import Conversation, Engine, SamplingParams
        from rorqual.ops.device import resolve_device
        from rorqual.weights import ModelFolder

        place = resolve_device(device)
        folder = ModelFolder.find(model, tokenizer)
        params = SamplingParams(
            **folder.sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                max_tokens=max_new_tokens,
            )
        )
        set_threads(threads)
        vocabulary = folder.load_tokenizer()
        weights = folder.load_model(dtype, place)
        # Whoever gives a seed wants the same text again: drafts, as many as pay just now, keep it
        # only up to rounding (`Engine`).
        is_drafting = seed is None and weights.config.num_nextn_predict_layers > 0
        engine = Engine(weights, vocabulary, speculate=MAX_DRAFTS if is_drafting else 0)
    converse(Conversation(engine, params, system), opening(folder))


def set_threads(threads: int | None) -> None:
    """Torch's threads for this process; None leaves them."""
    import torch

    from rorqual.ops.device import num_processors

    if threads is not None:
        most = num_processors()
        if not 1 <= threads <= most:  # torch itself crashes where there are far too many
            raise UsageError(
                "--threads is out of range",
                found=threads,
                expected=f"1 to {most}, the processors that this process may use",
                fix="leave it out: PyTorch chooses",
            )
        torch.set_num_threads(threads)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Tells a terminal that a model is being loaded."""
    if console().is_terminal:
        with console().status(f"Loading {name} ..."):
            yield
    else:
        yield


def opening(folder: ModelFolder) -> str:
    """The lines that begin a chat: the model, what it can do, how to leave."""
    card = folder.card()
    lines = [card.opening or f"This is {folder.name}."]
    lines += [f"  Try: {example}" for example in card.examples]
    return "\n".join([*lines, "/help shows the commands, /exit leaves."])


def converse(conversation: Conversation, first_lines: str) -> None:
    """A dialogue with whoever is at standard input, until it ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte ends no conversation
    if sys.stdin.isatty():
        _converse_in_terminal(conversation, first_lines)
    else:
        _answer_lines(conversation)


def _converse_in_terminal(conversation: Conversation, first_lines: str) -> None:
    import readline  # noqa: F401  gives `input` line editing and a history

    print(first_lines)
    prompt = _Prompt()
    before = signal.signal(signal.SIGINT, prompt.note_interrupt)
    try:
        while (text := prompt.read()) != "/exit":
            if not _is_command(conversation, text, print):
                _answer(conversation, text, show=printable)
    finally:
        signal.signal(signal.SIGINT, before)


class _Prompt:
    """Reads lines; Ctrl-C gives up the line and nothing else, whenever it comes."""

    def __init__(self) -> None:
        self._is_reading = False

    def note_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self._is_reading:
            self._is_reading = False  # one exception a line: none can escape from its handler
            raise KeyboardInterrupt

    def read(self) -> str:
        """The next line; an empty one for Ctrl-C, /exit at the end of input."""
        try:
            self._is_reading = True
            text = input(PROMPT).strip()
            self._is_reading = False
        except KeyboardInterrupt:
            text = ""
            print()
        except EOFError:
            self._is_reading = False
            text = "/exit"
            print()
        return text


def _answer_lines(conversation: Conversation) -> None:
    for line in sys.stdin:
        text = line.strip()
        if text == "/exit":
            return
        if not _is_command(conversation, text, _notice):
            _answer(conversation, text, show=str)


def _is_command(conversation: Conversation, text: str, say: Callable[[str], Any]) -> bool:
    """Does what an empty line or a line with a slash command asks; False for a message."""
    if text == "/clear":
        conversation.clear()
        say("A new conversation begins.")
    elif text == "/help":
        say(HELP)
    elif re.fullmatch(r"/\w+", text):
        say(f"There is no command {text}.\n{HELP}")
    else:
        return not text
    return True


def _answer(conversation: Conversation, text: str, show: Callable[[str], str]) -> None:
    """Streams an answer to standard output; in a terminal Ctrl-C ends it early.

    A message that cannot be answered is told to a terminal, and ends the program over a pipe.
    """
    is_terminal = sys.stdin.isatty()
    try:
        pieces = conversation.ask(text)
    except RorqualError as problem:
        if not is_terminal:
            raise
        _notice(str(problem))
        return
    if num_dropped := conversation.num_dropped_turns:
        turns = "the oldest turn" if num_dropped == 1 else f"the {num_dropped} oldest turns"
        _notice(f"[The conversation outgrew the model's context: {turns} forgotten.]")
    with closing(pieces), _interruptible(is_terminal) as is_interrupted:
        for piece in pieces:
            print(show(piece), end="", flush=True)
            if is_interrupted():
                print(" [stopped]", end="")
                break
    print(flush=True)


def _interruptible(is_wanted: bool) -> AbstractContextManager[Callable[[], bool]]:
    """Lets Ctrl-C, if wanted, set what is yielded instead of raising; a second one raises."""
    from rorqual.engine.interrupts import noted

    if not is_wanted:
        return nullcontext(lambda: False)
    return noted(signal.SIGINT, signal.default_int_handler)


def printable(text: str) -> str:
    """Control characters made visible, so that no answer can steer the terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _notice(text: str) -> None:
    """A line for the person, never part of the answers."""
    print(text, file=sys.stderr, flush=True)
