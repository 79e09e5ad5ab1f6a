"""`rorqual eval`: accuracy by task, and bits per byte beside an n-gram model and gzip."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual.cli.engine_flags import EngineFlags, with_engine_flags
from rorqual.cli.options import TokenizerPath
from rorqual.cli.tasks import as_records, find_tasks, print_results
from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.eval import SourceResult
    from rorqual.tasks import TaskResult


@with_engine_flags
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint or run folder, or 'tiny'.")] = "tiny",
    tokenizer: TokenizerPath = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", "--skill", metavar="NAME,...", help="Only these tasks; niah: needles."
        ),
    ] = None,
    questions: Annotated[
        int,
        typer.Option("--questions", "--skills", min=0, help="Held-out questions of each; 0: none."),
    ] = 200,
    recipe: Annotated[
        Path | None, typer.Option(help="Also bits per byte on this recipe's held-out text.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    failures: Annotated[int, typer.Option(min=0, help="Wrong answers to show of each task.")] = 0,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Of niah: tokens of prompts. [default: 1/8 to all of the context]"
        ),
    ] = None,
    depths: Annotated[
        int | None, typer.Option(min=1, help="Of niah: how many, from 0 to 1. [default: 5]")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Of niah: of each length and depth. [default: 4]")
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(help="Of niah: a text or a folder of texts. [default: Python's manual]"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Of niah: as a text to go on with, not as a chat.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of niah: ask this server; MODEL gives the tokenizer."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Of niah: its map.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    *,
    flags: EngineFlags,
) -> None:
    """Measures a chat model: accuracy by task on unseen questions, bits per byte on unseen text.

    \b
    Examples:
      rorqual eval tiny
      rorqual eval tiny --tasks arithmetic,dates --questions 1000 --failures 5
      rorqual eval runs/tiny/checkpoints/step-900 --questions 0 --recipe recipes/tiny.toml
      rorqual eval DIR --tasks niah --lengths 4k,16k,32k --depths 10 --plot needles.png
      rorqual eval DIR --tasks niah --server http://127.0.0.1:8000
    """
    from rorqual.cli.eval_needle import NeedleWish, measure_needles
    from rorqual.engine import SamplingParams
    from rorqual.eval import compare_on_held_out, evaluate_tasks
    from rorqual.eval.tasks import MAX_ANSWER_TOKENS
    from rorqual.log import console
    from rorqual.weights import ModelFolder

    if not questions and recipe is None:
        raise UsageError(
            "nothing is to be measured",
            found="--questions 0 without --recipe",
            fix="ask questions (--questions 200), or name a recipe for bits per byte (--recipe)",
        )
    wish = NeedleWish(lengths, depths, trials, haystack, raw, server, plot)
    if wish.is_asked(tasks, recipe):
        measure_needles(wish, model, tokenizer, flags, seed, as_json)
        return
    options = flags.options()
    asked = find_tasks(tasks)
    held_out = _held_out_text(recipe) if recipe is not None else None
    folder = ModelFolder.find(model, tokenizer)
    engine = flags.engine(folder, folder.load_tokenizer(), options)
    results: list[TaskResult] = []
    if questions:
        with console().status("asking"):
            params = SamplingParams(
                **folder.sampling(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
            )
            results = list(evaluate_tasks(engine, asked, questions, seed, params))
    compressed: list[SourceResult] = []
    if held_out is not None:
        with console().status("coding held-out text"):
            compressed = compare_on_held_out(engine.model, engine.tokenizer, *held_out)
    if as_json:
        table = {
            "tasks": as_records(results, failures),
            "bits_per_byte": [asdict(result) for result in compressed],
        }
        typer.echo(json.dumps(table, indent=2, ensure_ascii=False))
        return
    print_results(results, failures)
    _print_bits_per_byte(compressed)


def _held_out_text(path: Path) -> tuple[list[Path], int]:
    """The folders of a recipe's real sources, and its sequence length.

    DataError says what to run first if they are not built; asked before any question is.
    """
    from rorqual.cli.stages import stages
    from rorqual.errors import DataError, listing
    from rorqual.train import load_recipe

    recipe = load_recipe(path, stages())
    folders = recipe.held_out_folders()
    if not folders:
        raise DataError(
            "the recipe has generated text only, or none: bits per byte need real text",
            where=path,
            fix="leave --recipe out, or name the recipe of a stage that reads text",
        )
    unbuilt = [folder for folder in folders if not (folder / "held_out").is_dir()]
    if unbuilt:
        steps = [f"rorqual data build {path}"]
        if recipe.missing_sources():
            steps.insert(0, f"rorqual data fetch {path}")
        raise DataError(
            f"the recipe's token shards are not built: {listing(unbuilt)}",
            where=path,
            fix="; then ".join(steps) + "; or leave --recipe out",
        )
    return folders, recipe.training.sequence_length


def _print_bits_per_byte(results: list[SourceResult]) -> None:
    from rich.table import Table

    from rorqual.log import output_console

    if not results:
        return
    table = Table("held-out text", "bytes", "model", "5-gram", "gzip -9", title="bits per byte")
    for result in results:
        figures = (f"{value:.3f}" for value in (result.model, result.ngram, result.gzip))
        table.add_row(result.source, f"{result.num_bytes:,}", *figures)
    output_console().print(table)
