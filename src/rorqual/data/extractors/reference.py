"""Reference works out of packages: WordNet's glosses as sentences, and dictd dictionaries."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rorqual.data.extractors.prose import joined, paragraphs

# Neighbours in the file share a subject; alone they would be mostly BOS and EOS.
SYNSETS_A_DOCUMENT = 8
PARTS = ("noun", "verb", "adj", "adv")
NO_DOMAIN = frozenset(
    "British a an archaic by chiefly colloquial especially ethnic figurative followed"
    " for formal formerly from in informal not now obsolete of often old plural "
    "possibly postpositive predicate slang sometimes the to trademark usage used "
    "usually when with".split()
)
UNFIT = re.compile(r"\b(slur|offensive|disparag\w+|derogatory|obscene|vulgar|pejorative)\b")
EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Synset:
    """Words of one meaning, its definition, examples, and the offset of a more general meaning."""

    part: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    kind_of: int | None
    instance_of: int | None


def wordnet(root: Path) -> Iterator[str]:
    """Sentences on meaning, kind, synonyms and use; a few neighbouring synsets a document."""
    for file in sorted(root.rglob("wordnet/data.*")):
        part = file.suffix.removeprefix(".")
        if part not in PARTS:
            continue
        synsets = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                offset, synset = parse_synset(line, part)
                synsets[offset] = synset
        sentences = [
            synset_sentences(synset, synsets)
            for synset in synsets.values()
            if not UNFIT.search(synset.definition)
        ]
        for start in range(0, len(sentences), SYNSETS_A_DOCUMENT):
            yield "\n\n".join(sentences[start : start + SYNSETS_A_DOCUMENT]) + "\n"


def parse_synset(line: str, part: str) -> tuple[int, Synset]:
    """One line of a data file (format: wndb(5WN))."""
    fields, _, gloss = line.partition(" | ")
    columns = fields.split(" ")
    num_words = int(columns[3], 16)
    words = tuple(
        re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ")
        for word in columns[4 : 4 + 2 * num_words : 2]
    )
    pointers = columns[5 + 2 * num_words :]
    targets = {
        symbol: int(target)
        for symbol, target in pairwise(pointers)
        if symbol in ("@", "@i") and target.isdigit()
    }
    definition = EXAMPLE.split(gloss, maxsplit=1)[0].strip().rstrip(";:, ")
    return int(columns[0]), Synset(
        part, words, definition, tuple(EXAMPLE.findall(gloss)), targets.get("@"), targets.get("@i")
    )


def synset_sentences(synset: Synset, synsets: dict[int, Synset]) -> str:
    """The synset as a paragraph of plain sentences."""
    word = synset.words[0]
    if synset.part == "verb":
        sentences = [f"To {word} means to {synset.definition}."]
    elif synset.part == "noun" and word[0].isupper():
        sentences = [f"{word}: {synset.definition}."]
    else:
        domain, definition = _domain(synset.definition)
        opening = f"In {domain}, the" if domain else "The"
        sentences = [f'{opening} word "{word}" means {definition}.']
    parent = synsets.get(synset.kind_of if synset.kind_of is not None else -1)
    if parent and synset.part == "noun":
        sentences.append(f"{_capital(word)} is a kind of {parent.words[0]}.")
    elif parent and synset.part == "verb":
        sentences.append(f"It is a way to {parent.words[0]}.")
    instance = synsets.get(synset.instance_of if synset.instance_of is not None else -1)
    if instance:
        sentences.append(f"{word} is an example of {instance.words[0]}.")
    if len(synset.words) > 1:
        sentences.append(f"Another word for {word} is {_either(synset.words[1:])}.")
    sentences += [_sentence(example) for example in synset.examples]
    return " ".join(sentences)


def dictd(root: Path) -> Iterator[str]:
    """The entries of a dictd dictionary: the headword, then its paragraphs; links lose their
    braces.
    """
    for file in sorted(root.rglob("dictd/*.dict.dz")):
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as packed:
            yield from dictd_entries(packed.read())


def dictd_entries(text: str) -> Iterator[str]:
    """Entries begin at the first column; their bodies are indented."""
    for match in re.finditer(r"^(\S.*\n(?:\S.*\n)*)((?:[ \t].*\n|\n)+)", text, re.MULTILINE):
        heading, body = match.groups()
        words = [word.strip() for word in heading.splitlines()]
        if words[0].startswith("00-database"):
            continue
        body = re.sub(r"\{([^{}]*)\}", lambda m: joined([m[1]]), body)
        body = re.sub(r"^\s*\((?:19|20)\d\d-\d\d-\d\d\)\s*$", "", body, flags=re.MULTILINE)
        body = re.sub(r"<([a-z][^<>]*)>", r"(\1)", body)
        kept = paragraphs(body)
        if kept:
            yield "\n\n".join([", ".join(words), *kept]) + "\n"


def _domain(definition: str) -> tuple[str, str]:
    """("law", "a rule") of "(law) a rule"; no domain where the parenthesis is a note."""
    match = re.match(r"\(([a-z]+(?: [a-z]+)?)\) (?=\w)", definition)
    if match is None or match[1].split()[0] in NO_DOMAIN:
        return "", definition
    return match[1], definition[match.end() :]


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(example: str) -> str:
    example = _capital(example.strip().rstrip(";,"))
    return example if example.endswith((".", "!", "?")) else example + "."
