"""The needle map: how often a model finds one sentence in a text, by the text's length and by how
deep the sentence lies in it.

A prompt is as many whole sentences of real text as fit, from a place that the seed draws, with the
needle between two of them, and the question behind. Lengths are those of whole prompts in the
model's own tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.errors import DataError, UsageError
from rorqual.tasks import Grade
from rorqual.tasks.needle import INTRODUCTION, Needle
from rorqual.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ANSWER_TOKENS = 24
SHORTEST = 64  # tokens; the question and one sentence do not fit into fewer
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n{2,}")
Ask = Callable[[list[list[int]]], list[str]]
"""Prompts as ids to what the model says next."""


@dataclass(frozen=True)
class Trial:
    """`depth` is the share of the haystack that stands before the needle, `num_tokens` what the
    whole prompt has.
    """

    length: int
    depth: float
    num_tokens: int
    needle: Needle
    answer: str
    grade: Grade


@dataclass(frozen=True)
class Cell:
    """The trials of one length and depth."""

    length: int
    depth: float
    found: int
    total: int

    @property
    def share(self) -> float:
        return self.found / self.total


class Haystack:
    """Sentences of a text with their numbers of tokens; the text begins anew where it ends."""

    def __init__(self, text: str, tokenizer: Tokenizer, source: str) -> None:
        pieces = (" ".join(piece.split()) for piece in _SENTENCE_END.split(text))
        self.sentences = [piece for piece in pieces if len(piece) > 1]
        if len(self.sentences) < 2:
            raise DataError(
                "too little text for a haystack",
                where=source,
                found=f"{len(self.sentences)} sentences",
                expected="at least 2",
                fix="name a longer text with --haystack",
            )
        ids = tokenizer.encode_batch([" " + sentence for sentence in self.sentences])
        self.sizes = [len(some) for some in ids]

    def cut(self, num_tokens: int, rng: random.Random) -> tuple[list[str], list[int]]:
        """Sentences one after the other, of at most so many tokens together, and their sizes."""
        place = rng.randrange(len(self.sentences))
        sentences: list[str] = []
        sizes: list[int] = []
        total = 0
        while total + self.sizes[place] <= num_tokens:
            sentences.append(self.sentences[place])
            sizes.append(self.sizes[place])
            total += self.sizes[place]
            place = (place + 1) % len(self.sentences)
        return sentences, sizes


def read_haystack(path: Path | None, tokenizer: Tokenizer) -> Haystack:
    """The text of a file, or of a folder's .txt files; without one, Python's own manual."""
    if path is None:
        from pydoc_data.topics import topics

        return Haystack("\n\n".join(topics.values()), tokenizer, "Python's manual")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    except OSError as problem:
        raise DataError(
            f"cannot be read: {problem.strerror}", where=path, fix="name a text file"
        ) from None
    return Haystack(text, tokenizer, str(path))


def make_prompt(
    tokenizer: Tokenizer,
    haystack: Haystack,
    needle: Needle,
    length: int,
    depth: float,
    rng: random.Random,
    *,
    is_chat: bool,
) -> list[int]:
    """At most `length` ids, the place of the needle drawn by its depth: 0 is before all sentences,
    1 behind them.
    """
    place = _as_chat if is_chat else _as_text
    frame = len(place(tokenizer, needle.sentence, needle))
    sentences, sizes = haystack.cut(length - frame, rng)
    while True:
        before, target = 0, depth * sum(sizes)
        num_before = 0
        while num_before < len(sizes) and before + sizes[num_before] / 2 <= target:
            before += sizes[num_before]
            num_before += 1
        if depth >= 1:
            num_before = len(sizes)
        text = " ".join([*sentences[:num_before], needle.sentence, *sentences[num_before:]])
        ids = place(tokenizer, text, needle)
        if len(ids) <= length or not sentences:
            return ids
        sentences.pop()  # sentences that meet may take a token more than each by itself
        sizes.pop()


def _as_text(tokenizer: Tokenizer, text: str, needle: Needle) -> list[int]:
    asked = f"{INTRODUCTION}{text}\n\n{needle.question} {needle.beginning}"
    return tokenizer.encode(asked, bos=True)


def _as_chat(tokenizer: Tokenizer, text: str, needle: Needle) -> list[int]:
    content = f"{INTRODUCTION}{text}\n\n{needle.question}"
    return tokenizer.encode_chat([{"role": "user", "content": content}])


def trials(
    ask: Ask,
    tokenizer: Tokenizer,
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_trials: int,
    *,
    seed: int = 0,
    is_chat: bool,
) -> Iterator[Trial]:
    """`num_trials` of each length and depth, a length and depth after the other. The same seed
    draws the same needles and texts.
    """
    if min(lengths) < SHORTEST:
        raise UsageError(
            "a haystack of so few tokens has no room for a needle",
            found=f"{min(lengths)} tokens",
            expected=f"at least {SHORTEST}",
        )
    for length in lengths:
        for depth in depths:
            rng = random.Random(f"needle:{seed}:{length}:{depth:.6f}")
            needles = [Needle.drawn(rng) for _ in range(num_trials)]
            prompts = [
                make_prompt(tokenizer, haystack, needle, length, depth, rng, is_chat=is_chat)
                for needle in needles
            ]
            for needle, prompt, answer in zip(needles, prompts, ask(prompts), strict=True):
                yield Trial(length, depth, len(prompt), needle, answer, needle.grade(answer))


def cells(done: Sequence[Trial]) -> list[Cell]:
    """By length, then depth, in the order that they came in."""
    by_cell: dict[tuple[int, float], list[Trial]] = {}
    for trial in done:
        by_cell.setdefault((trial.length, trial.depth), []).append(trial)
    return [
        Cell(length, depth, sum(t.grade.reward == 1 for t in some), len(some))
        for (length, depth), some in by_cell.items()
    ]


def even_depths(count: int) -> list[float]:
    """From 0 to 1; one alone is the middle."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def draw_map(found: Sequence[Cell], title: str) -> Figure:
    """The heat map: length to the right, depth downwards, green where all needles were found."""
    from matplotlib.figure import Figure

    lengths = sorted({cell.length for cell in found})
    depths = sorted({cell.depth for cell in found})
    share = {(cell.depth, cell.length): cell.share for cell in found}
    table = [[share.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    figure = Figure(figsize=(1.8 + 0.7 * len(lengths), 1.6 + 0.35 * len(depths)), dpi=120)
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axes, label="found")
    figure.tight_layout()
    return figure
