"""`rorqual data`: fetch the sources of a recipe, build its token shards, list what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rorqual.data import DataSettings, TokenizerSettings

app = typer.Typer(
    no_args_is_help=True,
    help="Fetch text, build token shards, list sources.\n\n"
    "Example: rorqual data build recipes/tiny.toml",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Corpora = Annotated[
    Path | None, typer.Option(help="Folder of fetched sources [default: the recipe's, or corpora].")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one value, as in --set data.held_out=0.02."),
]


@app.command("fetch")
def fetch_command(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|NAME...", help="A recipe (.toml) or sources' names."),
    ],
    corpora: Corpora = None,
    as_json: AsJson = False,
) -> None:
    """Download sources, and extract their text.

    They come through pip and apt-get, and are not installed. One that is there already is skipped.

    Examples: rorqual data fetch recipes/tiny.toml / rorqual data fetch wordnet jane-austen
    """
    from rorqual.data.sources import CORPORA, fetch, get_source, source_folder
    from rorqual.log import console

    wanted: dict[str, Path] = {}
    for name in names:
        if name.endswith(".toml"):
            _, data = _sections(Path(name), ())
            for source in data.sources:
                if source.is_packaged and source.name:
                    wanted[source.name] = corpora or Path(data.corpora)
        else:
            wanted[get_source(name).name] = corpora or CORPORA
    records = []
    for name, folder in wanted.items():
        with console().status(f"fetching {name}"):
            record = fetch(name, folder)
        records.append(record)
        console().print(
            f"{name}: {record['num_documents']:,} documents, "
            f"{record['text_bytes'] / 1e6:.1f} MB in {source_folder(name, folder)}"
        )
    if as_json:
        typer.echo(json.dumps(records, indent=2))


@app.command("build")
def build_command(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A TOML file with the sections tokenizer and data."),
    ],
    overrides: Overrides = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that tokenise; the result is the same.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Generate and tokenise a recipe's sources.

    Memory-mapped shards are written, without the network.

    Sources that packages carry must lie there already: `rorqual data fetch RECIPE`. If they do
    not, this is an error that names them.

    The tokenizer is trained first if its folder does not exist. An interrupted build goes on where
    it was.

    Example: rorqual data build recipes/tiny.toml --workers 4
    """
    from rorqual.cli.progress import shown_progress
    from rorqual.corpus_writer import GENERATORS
    from rorqual.data.build import build
    from rorqual.log import console

    tokenizer, data = _sections(recipe, overrides or ())
    with shown_progress() as advance:
        summary = build(data, tokenizer, GENERATORS, workers, advance)
    rows = [
        {"source": source, "split": split, **{key: manifest[key] for key in COUNTS}}
        for source, splits in summary.manifests.items()
        for split, manifest in splits.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        columns = ["source", "split", *COUNTS.values()]
        keys = ["source", "split", *COUNTS]
        _print_table(columns, [[_cell(row[key]) for key in keys] for row in rows])
    state = "were there already" if summary.was_done else "written"
    console().print(
        f"{summary.total('num_tokens'):,} training tokens {state}: {summary.folder}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("list")
def list_command(corpora: Corpora = None, as_json: AsJson = False) -> None:
    """List the sources that packages carry.

    With licence, packages, and what is fetched.

    Example: rorqual data list --json
    """
    from rorqual.data.sources import CORPORA, SOURCES, source_record

    rows: list[dict[str, Any]] = []
    for source in SOURCES.values():
        record = source_record(source.name, corpora or CORPORA)
        rows.append(
            {
                "name": source.name,
                "description": source.description,
                "licence": source.licence,
                "packages": list(source.packages),
                "is_fetched": record is not None,
                "text_bytes": record["text_bytes"] if record else None,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [
        [
            str(row["name"]),
            str(row["description"]),
            str(row["licence"]),
            f"{row['text_bytes'] / 1e6:.1f} MB" if row["text_bytes"] else "not fetched",
        ]
        for row in rows
    ]
    _print_table(["name", "description", "licence", "text"], cells)


COUNTS = {  # key of a manifest -> the table's column
    "num_documents": "documents",
    "num_tokens": "tokens",
    "text_bytes": "bytes",
    "num_duplicates": "repeated",
    "licence": "licence",
}


def _sections(recipe: Path, overrides: Any) -> tuple[TokenizerSettings, DataSettings]:
    """The recipe's [tokenizer] and [data]; the other sections are training's."""
    from rorqual.config import apply_overrides, fill, read_toml
    from rorqual.data.settings import BuildSettings

    table = apply_overrides(read_toml(recipe), overrides)
    sections = {name: part for name, part in table.items() if name in ("tokenizer", "data")}
    found = fill(BuildSettings, sections, where=recipe, overrides=overrides)
    return found.tokenizer, found.data


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    from rorqual.log import output_console

    table = Table(box=None, header_style="bold")
    for column, *cells in zip(columns, *rows, strict=True):
        is_number = bool(cells) and all(cell.replace(",", "").isdigit() for cell in cells)
        # Numbers stay whole on a narrow terminal; names and texts go on in the next line.
        justify: Any = "right" if is_number else "left"
        table.add_column(column, justify=justify, no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*row)
    output_console().print(table)
