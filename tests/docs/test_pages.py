"""What pages say of themselves: links lead somewhere, commands have the options that they name,
quoted messages are this program's.

Oracles: the command line's own parser, the Makefile, the source.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import click
import pytest
import typer
from markdown import LINK, MARKS, PAGES, ROOT, Block, all_blocks, anchors, blocks, prose, shown
from markdown import simple_commands as commands
from typer.main import get_command

from rorqual.cli.stages import stages
from rorqual.cli.verbs import VERBS, LazyGroup, _load
from rorqual.config import read_toml
from rorqual.data.corpus import document_from_record
from rorqual.errors import RorqualError
from rorqual.train import load_recipe

SHELL = ("sh", "console")
LANGUAGES = (*SHELL, "python", "toml", "json", "text", "")
# Programs that a reader has, beside those that are looked into below.
PROGRAMS = {
    "source",
    "cat",
    "cd",
    "cp",
    "docker",
    "echo",
    "head",
    "kubectl",
    "lm-eval",
    "ls",
    "mkdir",
    "nohup",
    "sbatch",
    "tail",
    "torchrun",
    "git",
}
TROUBLES = ROOT / "docs" / "troubleshooting.md"
MAX_IMAGE_BYTES = 150_000


@pytest.mark.parametrize("block", [b for p in PAGES for b in blocks(p)], ids=lambda b: b.name)
def test_a_block_says_what_it_is(block: Block) -> None:
    """So that each is tested as what it is; and output that nobody checks says when it was seen."""
    assert block.language in LANGUAGES[:-1], f"{block.name}: name the language behind the fence"
    assert set(block.marks) <= set(MARKS), f"{block.name}: marks are {MARKS}"
    has_output = any(line.output for line in shown(block)) and block.language == "console"
    if block.marks and has_output:
        assert re.search(r"seen \d{4}-\d\d-\d\d", block.text), f"{block.name}: seen when?"


@pytest.mark.parametrize("block", all_blocks(*SHELL), ids=lambda block: block.name)
def test_its_commands_have_the_options_that_it_names(block: Block) -> None:
    for line in shown(block):
        for words in commands(line.line):
            check_command(words, block)


def check_command(words: Sequence[str], block: Block) -> None:
    is_setting = [re.fullmatch(r"[A-Z_]+=.*", word) is not None for word in words]
    program, *rest = words[is_setting.index(False) :]
    place = f"{block.name}: {' '.join(words)}"
    if program == "rorqual":
        parse(rest, place)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, is_variable, _ = word.partition("=")
            pattern = rf"\$\({name}\)" if is_variable else rf"^{re.escape(name)}:"
            assert re.search(pattern, makefile, re.MULTILINE), place
    elif program in ("python", "python3"):
        check_python(rest, block, place)
    elif program == "pip":
        extras = re.findall(r"(?:rorqual|\.)\[([\w,]+)\]", " ".join(rest))
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for name in ",".join(extras).split(",") if extras else ():
            assert name in known["optional-dependencies"], place
    elif program == "curl":
        if "-d" in rest:
            json.loads(rest[rest.index("-d") + 1])
    elif "/" in program:
        assert (ROOT / program).is_file(), place
    else:
        assert program in PROGRAMS, place


def check_python(rest: Sequence[str], block: Block, place: str) -> None:
    first = rest[0]
    if first == "-c":
        compile(rest[1], place, "exec")
    elif first == "-m":
        in_repository = (ROOT / f"{rest[1].replace('.', '/')}.py").is_file()
        assert in_repository or importlib.util.find_spec(rest[1]) is not None, place
    else:
        files = [other.file for other in blocks(block.page)]
        assert (ROOT / first).is_file() or first in files, place


@cache
def root() -> click.Command:
    app = typer.Typer(cls=LazyGroup, rich_markup_mode=None)
    app.callback()(lambda: None)
    return get_command(app)


def parse(words: Sequence[str], place: str) -> None:
    """By the verb's own parser, without running it."""
    words = [word for word in words if word != "--debug"]
    if words[0].startswith("-"):
        assert words[0] in ("--help", "--version"), place
        return
    assert words[0] in VERBS, place
    try:
        context = click.Context(root(), info_name="rorqual")
        command: click.Command = _load(words[0])
        rest = list(words[1:])
        while isinstance(command, click.Group):
            assert rest[0] in command.commands, place
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[0], rest, parent=context)
    except click.exceptions.Exit:
        pass  # --help, --keys
    except click.ClickException as problem:
        pytest.fail(f"{place}: {problem.format_message()}")


SPAN = re.compile(r"(?<!`)`rorqual ([a-z][a-z-]*)([^`\n]*)`(?!`)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_have_their_options_too(page: Path) -> None:
    """It may have `|`, `...` and names in capitals, so the names of its options are compared."""
    for verb, rest in SPAN.findall(prose(page)):
        assert verb in VERBS, f"{page.name}: rorqual {verb}"
        commands = [_load(verb)]
        if isinstance(commands[0], click.Group):
            commands = [*commands[0].commands.values()]
        known = {
            name
            for command in commands
            for parameter in command.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        } | {"--help", "--debug"}
        asked = set(re.findall(r"--[a-z][\w-]*", rest))
        assert asked <= known, f"{page.name}: `rorqual {verb}{rest}`"


@pytest.mark.parametrize("block", all_blocks("python", "json", "toml"), ids=lambda b: b.name)
def test_other_blocks_are_what_they_say(block: Block, tmp_path: Path) -> None:
    if block.language == "python":
        compile(block.text, block.name, "exec")
    elif block.language == "json":
        text = block.text.strip()
        json.loads(text if text.startswith(("{", "[")) else f"{{{text}}}")
        if block.text.startswith('{"messages"'):
            document_from_record(json.loads(block.text), "page", block.page)
    else:
        file = tmp_path / "recipe.toml"
        file.write_text(block.text, encoding="utf-8")
        table = read_toml(file)
        if "training" in table:
            load_recipe(file, stages())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name}: {target}"


def test_a_reader_can_come_to_every_page() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(prose(page))
    }
    assert [page.name for page in PAGES[1:] if page not in linked] == []
    images = (ROOT / "docs" / "images").iterdir()
    assert [image.name for image in images if image.stat().st_size > MAX_IMAGE_BYTES] == []


@cache
def strings() -> str:
    """All text of the source: each string, an f-string with `\\0` in place of what differs."""
    found: list[str] = []
    for path in sorted((ROOT / "src" / "rorqual").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(_text(part) for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found.append((ROOT / "Makefile").read_text(encoding="utf-8"))
    return "\n".join(found)


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "\0"


def quoted() -> Iterator[str]:
    """The messages in the first column of the page's tables."""
    for line in TROUBLES.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| symptom", "|---")):
            symptom = re.split(r" \| ", line[2:])[0]
            yield from (text for text in re.findall(r"`([^`]+)`", symptom) if " " in text)


NO_MESSAGES = {"training.compile = true"}


@pytest.mark.parametrize("message", sorted(set(quoted()) - NO_MESSAGES))
def test_a_quoted_message_is_this_programs(message: str) -> None:
    for part in message.split("..."):
        assert part.strip() in strings(), f"nothing says {part!r}"


def test_help_of_train_and_errors_name_pages_that_are_there(tmp_path: Path) -> None:
    named = re.findall(r"docs/[\w-]+\.md", strings())
    own = [name for name in named if name != "docs/gguf.md"]  # of another project
    assert {"docs/own-data.md", "docs/fine-tuning.md", "docs/runs.md"} <= set(own)
    assert [name for name in set(own) if not (ROOT / name).is_file()] == []
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "x"\n[trainning]\n', encoding="utf-8")
    with pytest.raises(RorqualError, match="rorqual train --keys"):
        load_recipe(recipe, stages())
