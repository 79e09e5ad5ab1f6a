"""The blocks of pages are run: in a folder that has what they speak of, with runs of seconds.

Marked blocks (network, hours, gpu, cluster) are not, but for recipes, which are looked at with
`--dry-run`; test_pages.py holds all of them to the real options.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from markdown import MARKS, PAGES, all_blocks, blocks
from markdown import Block as CodeBlock
from workspace import ADDRESS, make, put_files, run_block, served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "base"
    folder.mkdir()
    make(folder)
    return folder


@pytest.fixture(scope="session")
def address(base: Path) -> Iterator[str]:
    with served(["--model", "tiny"], base) as found:
        yield found


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "here", symlinks=True))


@pytest.mark.parametrize("block", all_blocks("sh", "console"), ids=lambda block: block.name)
def test_a_block_of_commands_runs(block: CodeBlock, folder: Path, address: str) -> None:
    put_files(block.page, folder)
    run_block(block, folder, address)


def pages_with_python() -> list[Path]:
    return [page for page in PAGES if any(_is_run(block) for block in blocks(page))]


def _is_run(block: CodeBlock) -> bool:
    is_free = not set(block.marks) & set(MARKS)
    return block.language == "python" and block.file is None and is_free


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, folder: Path, address: str) -> None:
    """One block after the other, as they stand on it."""
    names: dict[str, object] = {"__name__": "page"}
    with chdir(folder):
        for block in blocks(page):
            if _is_run(block):
                text = block.text.replace(ADDRESS, address)
                exec(compile(text, block.name, "exec"), names)
