"""Needles. Oracles: a reader that looks for the sentence in the prompt, and prompts read back."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from rorqual.bundled import checkpoint_path
from rorqual.errors import DataError, UsageError
from rorqual.eval.needle import (
    Haystack,
    Trial,
    cells,
    draw_map,
    even_depths,
    make_prompt,
    read_haystack,
    trials,
)
from rorqual.tasks.needle import Needle
from rorqual.tokenizer import Tokenizer, load_tokenizer

TEXT = " ".join(f"Sentence {i} of the text ends here." for i in range(400))
NEEDLE = Needle("kettle", "4711")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_path("tiny"))


@pytest.fixture(scope="module")
def haystack(tokenizer: Tokenizer) -> Haystack:
    return Haystack(TEXT, tokenizer, "here")


def prompt_of(
    tokenizer: Tokenizer, haystack: Haystack, length: int, depth: float, *, is_chat: bool = False
) -> tuple[list[int], str]:
    rng = random.Random(0)
    ids = make_prompt(tokenizer, haystack, NEEDLE, length, depth, rng, is_chat=is_chat)
    return ids, tokenizer.decode(ids)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("length", [80, 200, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_fills_its_length(
    tokenizer: Tokenizer, haystack: Haystack, length: int, depth: float, is_chat: bool
) -> None:
    ids, text = prompt_of(tokenizer, haystack, length, depth, is_chat=is_chat)
    assert length - 2 * max(haystack.sizes) < len(ids) <= length
    assert text.count(NEEDLE.sentence) == 1
    assert text.count(NEEDLE.question) == 1
    numbers = [int(n) for n in re.findall(r"Sentence (\d+) of", text)]
    first = numbers[0]
    assert numbers == [(first + i) % 400 for i in range(len(numbers))]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_needle_lies_as_deep_as_is_said(
    tokenizer: Tokenizer, haystack: Haystack, depth: float
) -> None:
    _, text = prompt_of(tokenizer, haystack, 1500, depth)
    before, after = (len(re.findall("Sentence", part)) for part in text.split(NEEDLE.sentence))
    assert abs(before / (before + after) - depth) < 0.02
    assert (before == 0) == (depth == 0)
    assert (after == 0) == (depth == 1)


def test_a_text_that_ends_begins_anew(tokenizer: Tokenizer) -> None:
    short = Haystack("One is here. Two is here. Three is here.", tokenizer, "here")
    _, text = prompt_of(tokenizer, short, 300, 0.5)
    assert text.count("Two is here.") > 5


def test_the_seed_draws_everything(tokenizer: Tokenizer, haystack: Haystack) -> None:
    asked: list[list[list[int]]] = []

    def ask(prompts: list[list[int]]) -> list[str]:
        asked.append(prompts)
        return ["" for _ in prompts]

    def run(seed: int) -> list[Trial]:
        some = [100, 200], [0.0, 1.0], 2
        return list(trials(ask, tokenizer, haystack, *some, seed=seed, is_chat=True))

    first, again, other = run(0), run(0), run(1)
    assert first == again != other
    assert asked[:4] == asked[4:8] != asked[8:]
    places = [(trial.length, trial.depth) for trial in first]
    assert places == [(n, d) for n in (100, 200) for d in (0.0, 1.0) for _ in range(2)]
    assert all(trial.num_tokens <= trial.length for trial in first)


def reader(tokenizer: Tokenizer, deepest: int) -> object:
    """Finds the number if its sentence is among the last `deepest` characters."""

    def ask(prompts: list[list[int]]) -> list[str]:
        texts = [tokenizer.decode(prompt)[-deepest:] for prompt in prompts]
        found = [re.search(r"The secret number of the \w+ is (\d+)", text) for text in texts]
        return [f" {match.group(1)}." if match else " I do not know." for match in found]

    return ask


def test_cells_count_what_was_found(tokenizer: Tokenizer, haystack: Haystack) -> None:
    some = reader(tokenizer, 600), tokenizer, haystack, [600], [0.0, 1.0], 3
    found = cells(list(trials(*some, is_chat=False)))  # type: ignore[arg-type]
    assert [(cell.depth, cell.found, cell.total, cell.share) for cell in found] == [
        (0.0, 0, 3, 0.0),
        (1.0, 3, 3, 1.0),
    ]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (" 4711", 1), ("It is 4,711.", 1), ("4711 or 1234", 1), ("1234 or 4711", 0), ("47111", 0),
        ("471", 0), ("", 0), ("seven", 0),
    ],
)  # fmt: skip
def test_the_first_number_counts(answer: str, reward: float) -> None:
    assert NEEDLE.grade(answer).reward == reward


def test_depths_are_even() -> None:
    assert even_depths(1) == [0.5]
    assert even_depths(2) == [0.0, 1.0]
    assert even_depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_haystacks_of_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("First one. Second one.")
    (tmp_path / "b" / "c.txt").write_text("Third one.")
    (tmp_path / "d.md").write_text("Not this.")
    found = read_haystack(tmp_path, tokenizer).sentences
    assert found == ["First one.", "Second one.", "Third one."]
    assert read_haystack(tmp_path / "a.txt", tokenizer).sentences == found[:2]
    assert len(read_haystack(None, tokenizer).sentences) > 1000
    with pytest.raises(DataError, match="cannot be read"):
        read_haystack(tmp_path / "none.txt", tokenizer)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match="too little text"):
        read_haystack(tmp_path / "a.txt", tokenizer)


def test_a_length_without_room_is_refused(tokenizer: Tokenizer, haystack: Haystack) -> None:
    def never(prompts: Sequence[object]) -> list[str]:
        raise AssertionError

    with pytest.raises(UsageError, match="no room"):
        next(trials(never, tokenizer, haystack, [64, 63], [0.5], 1, is_chat=True))


def test_the_map_is_drawn(tokenizer: Tokenizer, haystack: Haystack) -> None:
    pytest.importorskip("matplotlib")
    some = reader(tokenizer, 600), tokenizer, haystack, [300, 600], [0.0, 1.0], 1
    figure = draw_map(cells(list(trials(*some, is_chat=False))), "a title")  # type: ignore[arg-type]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["300", "600"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "100%"]
    assert axes.images[0].get_array().tolist() == [[0.0, 0.0], [1.0, 1.0]]  # type: ignore[union-attr]
    assert json.dumps([t.get_text() for t in axes.texts]) == '["0%", "0%", "100%", "100%"]'
