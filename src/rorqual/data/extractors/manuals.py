"""Manuals and code: the Python manual and standard library, and Debian's books."""

from __future__ import annotations

import gzip
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from rorqual.data.extractors.prose import joined

MIN_SECTION_CHARACTERS = 300  # shorter ones are lines of a table of contents
NO_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",  # tables of characters; the manual again as one string
}
BLOCKS = {
    "p",
    "div",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "li",
    "dt",
    "dd",
    "tr",
    "pre",
    "ul",
    "ol",
    "table",
}
HIDDEN = {"script", "style", "head"}


def python_docs(root: Path) -> Iterator[str]:
    """The manual's pages as reStructuredText, markup and all."""
    # The package links other folders to this one, and rglob does not follow links.
    for file in sorted(root.rglob("_sources/**/*.rst.txt")):
        if not file.is_symlink():
            yield file.read_text(encoding="utf-8")


def python_stdlib(root: Path) -> Iterator[str]:
    """The modules of the running Python's standard library, without their tests; `root` is not
    used.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if NO_LIBRARY & set(file.relative_to(library).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding
        if text.strip():
            yield text


def debian_docs(root: Path) -> Iterator[str]:
    """A document a section: the handbook (HTML), developer's reference (rst), reference, FAQ and
    policy (text).
    """
    for file in sorted(root.rglob("debian-handbook/html/en-US/*.html")):
        text = html_text(file.read_text(encoding="utf-8"))
        if len(text) >= MIN_SECTION_CHARACTERS:
            yield text + "\n"
    for file in sorted(root.rglob("developers-reference/_sources/*.rst.txt")):
        yield file.read_text(encoding="utf-8")
    for name in ("debian-reference.en.txt.gz", "debian-faq.en.txt.gz", "policy.txt.gz"):
        for file in sorted(root.rglob(name)):
            with gzip.open(file, "rt", encoding="utf-8", errors="replace") as packed:
                yield from sections(packed.read().replace("\xa0", " "))


def sections(text: str) -> Iterator[str]:
    """The numbered sections of a plain-text book, dedented; the table of contents is left out."""
    for piece in re.split(r"^(?=\d+\.\d+\. \S)", text, flags=re.MULTILINE)[1:]:
        heading, _, body = piece.partition("\n")
        body = re.sub(r"^[*=\-~^]{4,}$\n?", "", textwrap.dedent(body), flags=re.MULTILINE)
        body = re.sub(r"\n{3,}", "\n\n", body).strip()
        is_contents = (
            len(re.findall(r"^\W*\d+\.\d+\.", body, re.MULTILINE)) > 3 and len(body) < 4000
        )
        if len(body) >= MIN_SECTION_CHARACTERS and not is_contents:
            yield f"{heading}\n\n{body}\n"


def html_text(page: str) -> str:
    """The readable text of an HTML page: a paragraph a block, preformatted text as it stands."""
    reader = _TextReader()
    reader.feed(page)
    reader.close()
    return reader.text()


class _TextReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.current: list[str] = []
        self.hidden: list[str] = []
        self.is_preformatted = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        is_navigation = "docnav" in (names.get("class") or "") or names.get("id") in (
            "title",
            "banner",
        )
        if self.hidden:
            if tag == self.hidden[-1]:
                self.hidden.append(tag)
        elif tag in HIDDEN or is_navigation:
            self.hidden.append(tag)
        elif tag in BLOCKS:
            self._end_block()
            if tag == "li":
                self.current.append("- ")
            self.is_preformatted = tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            if tag == self.hidden[-1]:
                self.hidden.pop()
        elif tag in BLOCKS:
            self._end_block()
            self.is_preformatted = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.current.append(data)

    def text(self) -> str:
        self._end_block()
        return "\n\n".join(self.blocks)

    def _end_block(self) -> None:
        raw = "".join(self.current)
        block = raw.strip("\n") if self.is_preformatted else joined([raw])
        if block.strip(" -\n"):
            self.blocks.append(block)
        self.current = []
