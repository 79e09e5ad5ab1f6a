"""Prose out of unpacked packages: bible, novels, parables, encyclopedia articles, quotations.

Each function takes the folder of unpacked packages and yields one text a document, with markup
removed and hard-wrapped paragraphs joined.
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from rorqual.data.extractors.rdata import load_lazy_database

NOVELS = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}
MIN_ARTICLE_CHARACTERS = 200
FORTUNES = (  # Choice: the general collections; politics, songs, ethnic and drug jokes stay out
    "art",
    "computers",
    "cookie",
    "debian",
    "definitions",
    "education",
    "food",
    "fortunes",
    "humorists",
    "kids",
    "law",
    "linux",
    "literature",
    "magic",
    "medicine",
    "miscellaneous",
    "news",
    "paradoxum",
    "people",
    "pets",
    "riddles",
    "science",
    "sports",
    "wisdom",
    "work",
)


def joined(lines: Iterable[str]) -> str:
    """One paragraph out of hard-wrapped lines."""
    return " ".join(" ".join(lines).split())


def paragraphs(text: str) -> list[str]:
    """The hard-wrapped paragraphs of a text, each on one line."""
    return [joined(block.splitlines()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def world_english_bible(root: Path) -> Iterator[str]:
    """A document a chapter; verse numbers, notes and USFM markers are left out."""
    for file in sorted(root.rglob("demo/*.usfm")):
        text = file.read_text(encoding="utf-8")
        if "FRT" in file.name or "GLO" in file.name:
            continue  # the front matter and the glossary are not the text
        yield from usfm_chapters(text)


def usfm_chapters(text: str) -> Iterator[str]:
    """The chapters of one book of USFM (Unified Standard Format Markers)."""
    title = re.search(r"^\\h +(.+?)\s*$", text, re.MULTILINE)
    book = title.group(1) if title else ""
    text = re.sub(r"\\(f|x|fe) .*?\\\1\*", "", text, flags=re.DOTALL)
    text = re.sub(r"\\\+?w ([^|\\]*)(\|[^\\]*)?\\\+?w\*", r"\1", text)
    chapters = re.split(r"^\\c +(\d+).*$", text, flags=re.MULTILINE)
    for number, chapter in zip(chapters[1::2], chapters[2::2], strict=True):
        blocks: list[str] = []
        for marker, content in re.findall(
            r"^\\(\w+)\*? ?(.*(?:\n(?!\\).*)*)", chapter, re.MULTILINE
        ):
            if re.fullmatch(r"(cl|cp|ca|cd|s\d?|r|rem|sts|toc\d?|mt\d?|mte\d?)", marker):
                continue
            if marker == "v":
                content = re.sub(r"^\S+\s*", "", content)
            content = joined([re.sub(r"\\\+?\w+\*?", " ", content)])
            content = re.sub(r" +([,.;:!?’”)])", r"\1", content)
            if marker == "v" and blocks:
                glue = "" if blocks[-1] == "" or blocks[-1].endswith("\n") else " "
                blocks[-1] += glue + content
            elif re.match(r"q\d?$", marker) and blocks and blocks[-1]:
                blocks[-1] = blocks[-1].rstrip("\n") + "\n" + content
            elif marker != "v" and not content and blocks and not blocks[-1]:
                continue
            else:
                blocks.append(content)
        body = "\n\n".join(block.strip() for block in blocks if block.strip())
        if body:
            yield f"{book} {number}\n\n{body}\n"


def jane_austen(root: Path) -> Iterator[str]:
    """A document a chapter of the six novels."""
    stems = [file.with_suffix("") for file in root.rglob("janeaustenr/data/Rdata.rdb")]
    for name, lines in sorted(item for stem in stems for item in load_lazy_database(stem).items()):
        pieces = re.split(
            r"^(?:CHAPTER|Chapter) ([IVXLC\d]+)\.?$", "\n".join(lines), flags=re.MULTILINE
        )
        for number, chapter in zip(pieces[1::2], pieces[2::2], strict=True):
            kept = [
                re.sub(r"\b_|_\b", "", paragraph)
                for paragraph in paragraphs(chapter)
                if not re.fullmatch(r"VOLUME [IVX]+|FINIS|THE END|Finis", paragraph)
            ]
            yield "\n\n".join([f"{NOVELS[name]}, Chapter {number}", *kept]) + "\n"


def parables(root: Path) -> Iterator[str]:
    """Each story once, with its moral."""
    seen = set()
    for file in sorted(root.rglob("parable-to-moral-match-en.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            story, _, rest = item["input"][-1]["content"].partition("\nWhich moral is this story")
            letter = item["ideal"][0][-1]
            options = re.search(
                rf"(?:^|\s){letter}\) (.*?)(?= [A-Z]\) |\nThe output should)", rest, re.DOTALL
            )
            story = re.sub(r'(?<=[.!?,])""', '" "', joined([story]))
            story = re.sub(r'(?<=[.!?]")(?=[A-Z])', " ", story)
            story = re.sub(
                r'(,") (Said|Cried|Asked|Replied)\b', lambda m: f"{m[1]} {m[2].lower()}", story
            )
            if options is None or story in seen:
                continue
            seen.add(story)
            yield f"{story}\n\nMoral: {joined([options.group(1)])}\n"


def wikipedia(root: Path) -> Iterator[str]:
    """The articles of the shortened dump; redirects are left out."""
    for file in sorted(root.rglob("enwiki-latest-pages-articles1*.bz2")):
        with bz2.open(file, "rb") as dump:
            for _, page in ElementTree.iterparse(dump):
                if not page.tag.endswith("}page"):
                    continue
                title = page.findtext("{*}title") or ""
                text = page.findtext("{*}revision/{*}text") or ""
                if page.findtext("{*}ns") == "0" and not text.lower().startswith("#redirect"):
                    body = plain_wikitext(text)
                    if len(body) > MIN_ARTICLE_CHARACTERS:
                        yield f"{title}\n\n{body}\n"
                page.clear()


def plain_wikitext(text: str) -> str:
    """Wikitext without templates, tables, references, links and emphasis; endings without prose are
    cut.
    """
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref[^>/]*/>", "", text)
    text = re.sub(
        r"<(ref|gallery|math|timeline|imagemap|source)\b.*?</\1>", "", text, flags=re.DOTALL
    )
    for opening, closing in (("{{", "}}"), ("{|", "|}")):
        text = _without_nested(text, opening, closing)
    text = _without_media_links(text)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[?https?://\S+\]?", "", text)
    text = re.sub(r"'{2,}|</?[a-zA-Z][^>]*>|__[A-Z]+__", "", text)
    text = text.replace("&nbsp;", " ").replace("&ndash;", "–").replace("&mdash;", "—")
    text = re.split(
        r"^=+ *(?:See also|References|Notes|External links|Further reading|Bibliography) *=+",
        text,
        maxsplit=1,
        flags=re.MULTILINE,
    )[0]
    text = re.sub(r"^(=+) *(.*?) *=+\s*$", r"\n\2\n", text, flags=re.MULTILINE)
    text = re.sub(r"\(\s*[,;]*\s*\)", "", text)
    text = re.sub(r"\(\s*[,;]\s*", "(", text)
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines()]
    lines = [re.sub(r" ([,.;:])", r"\1", re.sub(r"^[*#:;]+ *", "- ", line)) for line in lines]
    kept = [line for line in lines if line not in ("-", "|}") and not line.startswith("|")]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(kept)).strip()


def fortunes(root: Path) -> Iterator[str]:
    """Quotations and jokes of the general collections."""
    for file in sorted(root.rglob("games/fortunes/*")):
        if file.name not in FORTUNES or not file.is_file():
            continue
        for text in file.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            text = text.replace("\t", "    ").strip("\n% ")
            has_control = re.search(
                r"[\x00-\x08\x0b-\x1f\ufffd]", text
            )  # overstrikes, broken characters
            if len(text) > 20 and not has_control:
                yield text + "\n"


def _without_nested(text: str, opening: str, closing: str) -> str:
    kept: list[str] = []
    depth = 0
    for piece in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if piece == opening:
            depth += 1
        elif piece == closing:
            depth = max(0, depth - 1)
        elif depth == 0:
            kept.append(piece)
    return "".join(kept)


def _without_media_links(text: str) -> str:
    """Removes [[File:...]], [[Category:...]] and interlanguage links, whose captions may hold
    links.
    """
    kept: list[str] = []
    place = 0
    for match in re.finditer(r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?):", text):
        if match.start() < place:
            continue
        kept.append(text[place : match.start()])
        depth, place = 1, match.end()
        while depth and (token := re.compile(r"\[\[|\]\]").search(text, place)):
            depth += 1 if token.group() == "[[" else -1
            place = token.end()
    kept.append(text[place:])
    return "".join(kept)
