"""`rorqual train`: makes what a recipe's stage learns from where it is missing, then trains or
continues.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual.cli.exits import EXIT_SIGNAL
from rorqual.cli.options import DeviceName

if TYPE_CHECKING:
    import torch

    from rorqual.train import Recipe, Summary, TrainingData
    from rorqual.train.preflight import Preview
    from rorqual.train.ranks import Ranks


def _print_keys(is_asked: bool) -> None:
    """The page of all keys: rendered on a terminal, Markdown into a file."""
    if not is_asked:
        return
    from rich.markdown import Markdown

    from rorqual.cli.stages import stages
    from rorqual.log import output_console
    from rorqual.train.keys import page

    text = page(stages())
    if output_console().is_terminal:
        output_console().print(Markdown(text))
    else:
        typer.echo(text, nl=False)
    raise typer.Exit()


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder [default: runs/<the recipe's name>].")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Continue the run's latest checkpoint, or set the old run aside and start over.",
        ),
    ] = True,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Continue though the recipe now has another schedule, batch or optimiser.",
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value, as in --set training.total_tokens=1000000."),
    ] = None,
    device: DeviceName = "auto",
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, show the plan, write nothing.")
    ] = False,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            callback=_print_keys,
            is_eager=True,
            help="Show every key of a recipe, and end.",
        ),
    ] = False,
) -> None:
    """Train a model as a recipe says: checkpoints, metrics.jsonl and plots go to the run folder.

    A recipe to start from: docs/own-data.md for text, docs/fine-tuning.md for conversations. What
    resumes, and what is in a run folder: docs/runs.md. Messages and their mends:
    docs/troubleshooting.md.

    Ctrl-C finishes the step and saves; the same command again goes on from there. A run that was
    stopped ends with exit code 130 (Ctrl-C), 143 (SIGTERM) or 129 (its terminal was closed).

    \b
    Examples:
      rorqual train recipes/tiny.toml
      rorqual train recipes/tiny.toml --run runs/wide --set model.moe_intermediate_size=512
      rorqual train recipes/tiny.toml --dry-run
      rorqual train --keys
    """
    from rorqual import train as training
    from rorqual.cli.ranks import first_speaks, joined_ranks, own_device
    from rorqual.cli.stages import stages
    from rorqual.ops.device import resolve_device
    from rorqual.parallel.launch import Launch
    from rorqual.train.prepare import refuse_to_move_what_is_read

    launch = Launch.of_environment()
    with first_speaks(launch):
        place = own_device(resolve_device(device), launch)
        settings = training.load_recipe(recipe, stages(), overrides or ())
        run_folder = run or Path("runs") / settings.name
        if launch.restart:  # --fresh was done at the first start
            resume = True
        if not resume:
            refuse_to_move_what_is_read(settings, run_folder)
        start = _Start(settings, run_folder, resume, allow_changes)
        if is_dry_run:
            if not launch.rank:
                start.show_plan(device)
            return
        settings.parallel.check_world(launch.world)
    with joined_ranks(settings.parallel, place, launch) as ranks:
        summary = start.train(place, ranks)
        if ranks.is_first:
            typer.echo(str(summary.checkpoint))
    if summary.signal is not None:
        # So that `train A && train B` stops here.
        raise typer.Exit(EXIT_SIGNAL + summary.signal)


@dataclass(frozen=True)
class _Start:
    """Which run is begun or continued, and how."""

    recipe: Recipe
    run_folder: Path
    is_resumed: bool
    allow_changes: bool

    def show_plan(self, device: str) -> None:
        from rorqual.cli.progress import shown_progress
        from rorqual.corpus_writer import GENERATORS
        from rorqual.train.preflight import preview

        with shown_progress() as advance:
            plan = preview(
                self.recipe,
                self.run_folder,
                GENERATORS,
                resume=self.is_resumed,
                allow_changes=self.allow_changes,
                advance=advance,
            )
        _print_plan(plan)
        _print_outline(self.recipe, device)

    def train(self, place: torch.device, ranks: Ranks) -> Summary:
        from rorqual import train as training
        from rorqual.cli.ranks import made_by_first
        from rorqual.corpus_writer import GENERATORS
        from rorqual.plan.peaks import peak_of
        from rorqual.train.prepare import take_prepared

        with ExitStack() as held:
            data = made_by_first(
                ranks, lambda: self._prepare(held), lambda: take_prepared(self.recipe, GENERATORS)
            )
            return training.train(
                self.recipe,
                self.run_folder,
                data,
                allow_changes=self.allow_changes,
                device=place,
                ranks=ranks,
                peak=lambda: peak_of(place, self.recipe.training.precision),
            )

    def _prepare(self, held: ExitStack) -> TrainingData:
        """The data, once the run folder is this run's, for as long as the stack is there."""
        from rorqual import train as training
        from rorqual.cli.progress import shown_progress
        from rorqual.corpus_writer import GENERATORS
        from rorqual.log import console
        from rorqual.train.preflight import look_ahead
        from rorqual.train.prepare import prepare

        lock = held.enter_context(training.run_lock(self.run_folder))
        with shown_progress() as advance:
            # Before the data: a run that may not go on must not replace token shards.
            look_ahead(
                self.recipe,
                self.run_folder,
                GENERATORS,
                resume=self.is_resumed,
                allow_changes=self.allow_changes,
                advance=advance,
            )
            data = prepare(self.recipe, GENERATORS, advance=advance)
        if not self.is_resumed and (aside := lock.set_aside()):
            console().print(f"the old run is now {aside}", highlight=False)
        return data


def _print_plan(plan: Preview) -> None:
    from rich.table import Table

    from rorqual.log import console

    table = Table(box=None, show_header=False)
    for name, value in plan.rows:
        table.add_row(name, value)
    console().print(table)
    for line in plan.lines:
        console().print(line, highlight=False, markup=False, soft_wrap=True)


def _print_outline(recipe: Recipe, device: str) -> None:
    """Who would hold what, memory of each rank, first steps: none of the ranks need be here, and
    of several each is taken to have a GPU unless the command says `--device cpu`.
    """
    from rorqual.cli.train_plan import print_outline
    from rorqual.log import console
    from rorqual.ops.device import resolve_device
    from rorqual.plan.training import outline_of
    from rorqual.train.prepare import config_of

    is_alone = recipe.parallel.world == 1
    name = device if is_alone or device != "auto" else "cuda"
    is_cpu = name == "cpu" or (name == "auto" and resolve_device(name).type == "cpu")
    print_outline(outline_of(recipe, config_of(recipe), is_cpu=is_cpu), console())
