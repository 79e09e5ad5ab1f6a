"""`rorqual eval`: accuracy by skill, and bits per byte beside an n-gram model and gzip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.chat import DeviceName, Threads, TokenizerPath, set_threads
from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.eval import SourceResult
    from rorqual.tasks import SkillResult


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint or run folder, or 'tiny'.")] = "tiny",
    tokenizer: TokenizerPath = None,
    skills: Annotated[
        int, typer.Option(min=0, help="Held-out questions of each skill; 0: none.")
    ] = 200,
    skill: Annotated[
        list[str] | None, typer.Option(help="Only this skill (may be repeated).")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Also bits per byte on this recipe's held-out text.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    device: DeviceName = "auto",
    threads: Threads = None,
    failures: Annotated[int, typer.Option(min=0, help="Wrong answers to show of each skill.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measures a chat model: accuracy by skill on unseen questions, bits per byte on unseen text.

    \b
    Examples:
      rorqual eval tiny
      rorqual eval tiny --skill arithmetic --skills 1000 --failures 5
      rorqual eval runs/tiny/checkpoints/step-900 --skills 0 --recipe recipes/tiny.toml
    """
    from rorqual.engine import Engine, SamplingParams
    from rorqual.eval import compare_on_held_out, evaluate_skills
    from rorqual.eval.skills import MAX_ANSWER_TOKENS
    from rorqual.log import console
    from rorqual.weights import ModelFolder

    if not skills and recipe is None:
        raise UsageError(
            "nothing is to be measured",
            found="--skills 0 without --recipe",
            fix="ask questions (--skills 200), or name a recipe for bits per byte (--recipe)",
        )
    set_threads(threads)
    held_out = _held_out_text(recipe) if recipe is not None else None
    folder = ModelFolder.find(model, tokenizer)
    engine = Engine(folder.load_model("auto", device), folder.load_tokenizer(), max_batch=32)
    results: list[SkillResult] = []
    if skills:
        with console().status("asking"):
            params = SamplingParams(
                **folder.sampling(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
            )
            results = evaluate_skills(engine, skills, seed, skill, params=params)
    compressed: list[SourceResult] = []
    if held_out is not None:
        with console().status("coding held-out text"):
            compressed = compare_on_held_out(engine.model, engine.tokenizer, *held_out)
    if as_json:
        typer.echo(json.dumps(_as_table(results, compressed), indent=2, ensure_ascii=False))
        return
    _print_skills(results, failures)
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


def _print_skills(results: list[SkillResult], num_failures: int) -> None:
    from rich.table import Table

    from rorqual.log import output_console

    if not results:
        return
    table = Table("skill", "right", "asked", "accuracy", "95 % interval")
    for result in results:
        interval = f"{result.low:.1%} to {result.high:.1%}"
        counts = (str(result.correct), str(result.total))
        table.add_row(result.skill, *counts, f"{result.accuracy:.1%}", interval)
    output = output_console()
    output.print(table)
    for result in results:
        for question, response in result.failures[:num_failures]:
            output.print(f"{result.skill}: {question.prompt!r}", markup=False)
            output.print(f"   said {response!r}", markup=False)
            output.print(f"   for  {question.answer!r}", markup=False)


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


def _as_table(skills: list[SkillResult], compressed: list[SourceResult]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "skills": [
            {
                "skill": result.skill,
                "correct": result.correct,
                "total": result.total,
                "low": result.low,
                "high": result.high,
            }
            for result in skills
        ],
        "bits_per_byte": [asdict(result) for result in compressed],
    }
