"""Flags that several verbs have, and what comes of them before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from rorqual.errors import UsageError
from rorqual.log import console, printable

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
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N. Auto: a GPU where torch sees one.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")]


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
def loading(name: str, *, is_logged: bool = False) -> Iterator[None]:
    """Tells a terminal that a model is being loaded; if logged, a file or a pipe too."""
    if console().is_terminal:
        from rich.text import Text

        with console().status(Text(printable(f"Loading {name} ..."))):
            yield
    else:
        if is_logged:
            console().print(f"Loading {name} ...", highlight=False)
        yield


def require_matplotlib(option: str) -> None:
    """UsageError where it is not installed: said before anything is measured or drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "matplotlib is not installed, so there can be no picture",
            fix=f"pip install 'rorqual[train]', or leave {option} out",
        ) from None
