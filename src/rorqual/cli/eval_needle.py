"""`rorqual eval --tasks niah`: the needle map, of an engine of our own or of a server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rorqual.errors import UsageError, listing

if TYPE_CHECKING:
    from rorqual.cli.engine_flags import EngineFlags
    from rorqual.engine import Engine
    from rorqual.eval.needle import Ask, Cell, Trial
    from rorqual.tokenizer import Tokenizer

NIAH = "niah"
DEPTHS, TRIALS = 5, 4
SHARES = (8, 4, 2, 1)  # of the model's context: the lengths that are measured unasked


@dataclass(frozen=True)
class NeedleWish:
    """The options of needles as they were given."""

    lengths: str | None
    depths: int | None
    trials: int | None
    haystack: Path | None
    is_raw: bool
    server: str | None
    plot: Path | None

    def is_asked(self, tasks: Sequence[str] | None, recipe: Path | None) -> bool:
        """Whether needles are. UsageError where they are with other things, or their options are
        and they are not.
        """
        names = [name.strip() for some in tasks or () for name in some.split(",")]
        if NIAH not in names:
            given = [name for name, value in vars(self).items() if value not in (None, False)]
            if given:
                raise UsageError(
                    f"--{given[0].removeprefix('is_')} is for needles alone",
                    found=f"tasks {listing(names)}" if names else "no --tasks",
                    fix=f"add --tasks {NIAH}, or leave it out",
                )
            return False
        if set(names) != {NIAH} or recipe is not None:
            raise UsageError(
                "needles are measured by themselves",
                found=f"{listing(names)}{'' if recipe is None else ' and --recipe'}",
                fix=f"run --tasks {NIAH} and the others one after the other",
            )
        return True


def measure_needles(
    wish: NeedleWish,
    model: str,
    tokenizer: str | None,
    flags: EngineFlags,
    seed: int,
    as_json: bool,
) -> None:
    """Runs them, prints their map and draws it."""
    from rorqual.cli.engine_flags import EngineFlags
    from rorqual.cli.options import require_matplotlib
    from rorqual.eval.needle import cells
    from rorqual.weights import ModelFolder

    if wish.plot is not None:
        require_matplotlib("--plot")
    if wish.server is not None and flags != EngineFlags():
        raise UsageError(
            "a server has its own engine",
            found="--server with flags of an engine",
            fix="give these flags to the server",
        )
    folder = ModelFolder.find(model, tokenizer)
    words = folder.load_tokenizer()
    engine = flags.engine(folder, words, flags.options()) if wish.server is None else None
    done = run_needles(wish, words, engine, seed)
    found = cells(done)
    if wish.plot is not None:
        write_map(found, wish.plot, f"{Path(model).name}: needles found")
    if as_json:
        typer.echo(json.dumps(needle_records(done), indent=2, ensure_ascii=False))
    else:
        print_map(found)


def read_lengths(text: str | None) -> list[int] | None:
    """`1024,4k` as numbers of tokens."""
    if text is None:
        return None
    found = []
    for part in text.lower().split(","):
        number, factor = (part.strip()[:-1], 1024) if part.strip().endswith("k") else (part, 1)
        if not number.strip().isdecimal() or not int(number):
            raise UsageError(
                "--lengths takes numbers of tokens",
                found=text,
                expected="such as 1024,4k,32k",
            )
        found.append(int(number) * factor)
    return sorted(set(found))


def run_needles(
    wish: NeedleWish, tokenizer: Tokenizer, engine: Engine | None, seed: int
) -> list[Trial]:
    """All trials, with their progress on the terminal. Without an engine the server is asked."""
    from rorqual.cli.progress import shown_progress
    from rorqual.eval.needle import MAX_ANSWER_TOKENS, SHORTEST, even_depths, read_haystack, trials

    if engine is None:
        assert wish.server is not None, "an engine, or a server"
        ask, context = ask_server(wish.server, MAX_ANSWER_TOKENS)
    else:
        ask, context = ask_engine(engine, MAX_ANSWER_TOKENS), engine.max_positions
    room = context - MAX_ANSWER_TOKENS
    unasked = [room // share for share in SHARES if room // share >= SHORTEST]
    lengths = read_lengths(wish.lengths) or unasked or [room]
    if max(lengths) > room:
        raise UsageError(
            "a haystack is longer than the model's context",
            found=f"{max(lengths):,} tokens",
            expected=f"at most {room:,}: {context:,} less {MAX_ANSWER_TOKENS} of the answer",
            fix="take shorter --lengths, or a longer context with --max-model-len",
        )
    haystack = read_haystack(wish.haystack, tokenizer)
    depths = even_depths(wish.depths or DEPTHS)
    done: list[Trial] = []
    num_trials = wish.trials or TRIALS
    total = len(lengths) * len(depths) * num_trials
    with shown_progress() as advance:
        for trial in trials(
            ask, tokenizer, haystack, lengths, depths, num_trials,
            seed=seed, is_chat=not wish.is_raw,
        ):  # fmt: skip
            done.append(trial)
            advance("needles", len(done), total, f"{trial.length:,} tokens")
    return done


def ask_engine(engine: Engine, max_tokens: int) -> Ask:
    from rorqual.engine import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return lambda prompts: [output.text for output in engine.generate(prompts, params)]


def ask_server(url: str, max_tokens: int) -> tuple[Ask, int]:
    """Asks the completions route of a server, ours or another, with ids; and its context."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    (model, *_) = _call(f"{base}/models", None)["data"]
    context = model.get("max_model_len")
    if not isinstance(context, int):
        raise UsageError(
            "the server does not say how long its context is",
            where=f"{base}/models",
            expected="max_model_len of the first model",
        )

    def ask(prompts: list[list[int]]) -> list[str]:
        body = {
            "model": model["id"],
            "prompt": prompts,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        choices = _call(f"{base}/completions", body)["choices"]
        return [choice["text"] for choice in sorted(choices, key=lambda each: each["index"])]

    return ask, context


def _call(url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    if not url.startswith(("http://", "https://")):
        raise UsageError("--server takes an address", found=url, expected="http://HOST:PORT")
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as problem:
        said = problem.read().decode(errors="replace")[:500]
        raise UsageError(f"the server refused: {said}", where=url, found=problem.code) from None
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"the server cannot be asked: {problem}",
            where=url,
            fix="start it (rorqual serve --model DIR), or correct --server",
        ) from None


def write_map(found: Sequence[Cell], file: Path, title: str) -> None:
    """The heat map as PNG."""
    from rorqual.eval.needle import draw_map
    from rorqual.files import atomic_write

    figure = draw_map(found, title)
    with atomic_write(file) as out:
        figure.savefig(out, format="png")


def needle_records(done: Sequence[Trial]) -> dict[str, Any]:
    """Cells, and every trial with what was said."""
    from rorqual.eval.needle import cells

    return {
        "cells": [{**asdict(cell), "share": cell.share} for cell in cells(done)],
        "trials": [
            {
                "length": trial.length,
                "depth": trial.depth,
                "num_tokens": trial.num_tokens,
                "subject": trial.needle.subject,
                "number": trial.needle.number,
                "answer": trial.answer,
                "reward": trial.grade.reward,
                "why": trial.grade.why,
            }
            for trial in done
        ],
    }


def print_map(found: Sequence[Cell]) -> None:
    """Depths downwards, lengths to the right."""
    from rich.table import Table

    from rorqual.log import output_console

    lengths = sorted({cell.length for cell in found})
    table = Table("depth", *(f"{length:,} tokens" for length in lengths), title="needles found")
    for depth in sorted({cell.depth for cell in found}):
        row = {cell.length: cell for cell in found if cell.depth == depth}
        table.add_row(f"{depth:.0%}", *(f"{row[n].share:.0%}" if n in row else "" for n in lengths))
    total, right = sum(cell.total for cell in found), sum(cell.found for cell in found)
    output_console().print(table)
    output_console().print(f"{right} of {total} found")
