"""The commands, on a recipe of one small file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rorqual.cli.data import app
from rorqual.data import open_tokens, sources
from rorqual.errors import ConfigError, DataError, UsageError

Write = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, texts: list[str], tokenizer_folder: Path, write_jsonl: Write) -> Path:
    source = write_jsonl(tmp_path / "mine.jsonl", texts)
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'name = "x"\n[model]\npreset = "tiny"\n[tokenizer]\nfolder = "{tokenizer_folder}"\n'
        f'[data]\nfolder = "{tmp_path}/t"\n[[data.sources]]\nname = "mine"\npath = "{source}"\n'
    )
    return path


def test_list_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["list", "--json", "--corpora", str(tmp_path)])
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert {row["name"] for row in rows} >= {"wordnet", "python-stdlib"}
    assert not any(row["is_fetched"] for row in rows)
    assert CliRunner().invoke(app, ["list"]).exit_code == 0


def test_build(recipe: Path, texts: list[str]) -> None:
    arguments = ["build", str(recipe), "--set", "data.held_out=0.3", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    rows = json.loads(result.stdout)
    assert sum(row["num_documents"] for row in rows) == len(texts)
    assert open_tokens(recipe.parent / "t/mine/held_out").num_tokens > 0
    assert CliRunner().invoke(app, ["build", str(recipe)]).exit_code == 0


def test_faults_are_errors_of_ours(recipe: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        CliRunner().invoke(app, arguments, catch_exceptions=False)

    with pytest.raises(UsageError, match="no such source"):
        run("fetch", "wordnt")
    with pytest.raises(ConfigError, match="no such file"):
        run("build", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="did you mean 'held_out'"):
        run("build", str(recipe), "--set", "data.heldout=1")
    with pytest.raises(ConfigError) as caught:
        run("build", str(recipe), "--set", "data.held_out=true", "--set", "data.seed=3")
    assert str(caught.value.where) == f"{recipe} --set data.held_out=true"
    (tmp_path / "empty.toml").write_text("[model]\n")
    with pytest.raises(ConfigError, match=r"missing section \[tokenizer\] with folder"):
        run("build", str(tmp_path / "empty.toml"))


def test_fetch_of_a_recipe_skips_paths(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["fetch", str(recipe), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout) == []


def test_build_never_fetches(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named at once, with the command that fetches it, wherever it is to lie."""
    commands: list[object] = []
    monkeypatch.setattr(sources.subprocess, "run", lambda *args, **_: commands.append(args))
    text = recipe.read_text() + "".join(
        f'[[data.sources]]\nname = "{name}"\n' for name in ("wordnet", "jane-austen")
    )
    corpora = f"{tmp_path}/my corpora"
    options = ["build", str(recipe), "--set", f"data.corpora={corpora}"]
    recipe.write_text(text)
    with pytest.raises(DataError, match="not been fetched: wordnet, jane-austen") as caught:
        CliRunner().invoke(app, options, catch_exceptions=False)
    assert caught.value.fix == f"rorqual data fetch wordnet jane-austen --corpora '{corpora}'"
    with pytest.raises(DataError) as caught:
        CliRunner().invoke(app, options[:2], catch_exceptions=False)
    assert caught.value.fix == "rorqual data fetch wordnet jane-austen"
    assert not commands
    assert not (tmp_path / "t" / "mine").exists()


def test_the_table_of_a_build_is_whole_in_a_file(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name and no number is cut, and a small corpus is counted in tokens, not in millions."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-name-of-a-source-that-is-rather-long-for-a-terminal"
    recipe.write_text(recipe.read_text().replace('"mine"', f'"{name}"'))
    rows = json.loads(CliRunner().invoke(app, ["build", str(recipe), "--json"]).stdout)
    done = CliRunner().invoke(app, ["build", str(recipe)], catch_exceptions=False)
    assert "…" not in done.stdout
    for word in ("documents", "tokens", "bytes", "repeated", "licence", "train"):
        assert word in done.stdout
    left = [line[: line.index("  ")].strip() for line in done.stdout.splitlines()[1:]]
    assert name in "".join(left)
    for row in rows:
        assert f"{row['num_tokens']:,}" in done.stdout
    total = sum(row["num_tokens"] for row in rows if row["split"] == "train")
    assert f"{total:,} training tokens were there already" in done.stderr


def test_the_help_of_build_promises_no_network() -> None:
    text = CliRunner().invoke(app, ["build", "--help"]).stdout
    assert "without the network" in " ".join(text.split())
