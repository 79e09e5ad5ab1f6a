"""Pages as tests read them: blocks of code with their marks, links, headings.

The first word behind the fence is the language. The others are marks, or `file=NAME`: the block is
that file, beside which the page's commands are run. A block with one of `MARKS` is not run: it
needs a network, hours, a GPU or a cluster.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = ("network", "hours", "gpu", "cluster")
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
OPERATORS = ("|", "&&", ";", "&", "||")


@dataclass(frozen=True)
class Block:
    """One block of code; `line` is that of its first line in the page."""

    page: Path
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def marks(self) -> list[str]:
        return [word for word in self.words[1:] if not word.startswith("file=")]

    @property
    def file(self) -> str | None:
        names = [word.removeprefix("file=") for word in self.words if word.startswith("file=")]
        return names[0] if names else None

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 2,
            tuple(match[2].split()),
            re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE),
        )
        for match in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its blocks and its comments."""
    return re.sub(
        r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL
    )


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


@dataclass(frozen=True)
class Shown:
    """A line of a shell, and what a page shows that it prints (None: nothing is shown)."""

    line: str
    output: str | None = None


def shown(block: Block) -> list[Shown]:
    """The lines of a block, those that end with a backslash joined; in a `console` block they begin
    with `$ `, and what follows is their output.
    """
    text = re.sub(r"\\\n\s*", "", block.text)
    if block.language != "console":
        return [Shown(line) for line in text.splitlines() if _is_command(line)]
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    pairs = [part.partition("\n") for part in parts if part.strip()]
    return [Shown(line, output or None) for line, _, output in pairs]


def _is_command(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    is_target = False
    for word in lexer:
        if word in OPERATORS:
            yield words
            words = []
        elif word in (">", ">>", "<"):
            is_target = True
        elif is_target:
            is_target = False
        else:
            words.append(word)
    if words:
        yield words


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", _plain(title).lower()).replace(" ", "-") for title in found}


def _plain(title: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip()
