"""Marks for special tokens in an answer. Oracle: the ids, put together whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.marked_stream import MarkedStream
from rorqual.tokenizer.marks import MARKS, unmarked

WORDS = [*MARKS, *(name[:5] for name in MARKS), *(name[5:] for name in MARKS), "ü", "a", "<", "鯨"]


def spelled(small: Tokenizer, text: str) -> list[int]:
    """Ordinary tokens, also for the names of special ones."""
    return small.encode(text)


answers = st.lists(st.tuples(st.sampled_from(WORDS), st.booleans()), max_size=8)


@settings(max_examples=150, deadline=None)
@given(answer=answers, random=st.randoms(use_true_random=False), num_cut=st.integers(0, 30))
def test_only_tokens_are_marked(
    small: Tokenizer, answer: list[tuple[str, bool]], random: Any, num_cut: int
) -> None:
    """However the text trails the ids, and wherever a stop string cuts it."""
    ids: list[int] = []
    expected = ""
    for word, is_token in answer:
        is_token = is_token and word in MARKS
        ids += [small.special_ids[word]] if is_token else spelled(small, word)
        expected += MARKS[word] if is_token else word
    text = small.decode(ids)
    cut = text[: len(text) - num_cut] if random.random() < 0.3 else text
    stream = MarkedStream(small)
    found, num_shown, num_ids = "", 0, 0
    while num_ids < len(ids):
        step = random.choice([1, 1, 2, 5])
        known = len(small.decode(ids[: num_ids + step]).rstrip("\ufffd"))
        end = max(num_shown, min(known - random.choice([0, 0, 1, 9]), len(cut)))
        found += stream.put(cut[num_shown:end], ids[num_ids : num_ids + step])
        num_ids, num_shown = num_ids + step, end
    found += stream.put(cut[num_shown:], []) + stream.finish()
    assert unmarked(found) == cut
    if cut == text:
        assert found == expected
    else:  # a name that was cut is text
        whole = next(n for n in range(len(expected) + 1) if len(unmarked(expected[:n])) > len(cut)
                     or n == len(expected))  # fmt: skip
        assert found.startswith(expected[: max(whole - 1, 0)])


def test_a_name_is_marked_as_soon_as_its_text_is_there(small: Tokenizer) -> None:
    stream = MarkedStream(small)
    name = "<｜tool▁call▁end｜>"
    end = small.special_ids[name]
    assert stream.put("a", [*small.encode("a"), end]) == "a"
    assert stream.put(name[:4], []) == ""
    assert stream.put(name[4:] + "b", small.encode("b")) == MARKS[name] + "b"
    assert stream.put(name, small.encode(name)) == name


def test_tokens_that_the_text_leaves_out_are_passed_over(small: Tokenizer) -> None:
    """As `skip_special_tokens` does with an end-of-sentence that ended nothing."""
    name = "<｜tool▁call▁end｜>"
    hidden = [small.eos_id, small.bos_id, small.eos_id]
    ids = [*small.encode("ab"), *hidden, *small.encode("c"), small.special_ids[name], small.eos_id]
    for size in range(1, 30):
        stream = MarkedStream(small)
        text = f"abc{name}"
        found = stream.put("", ids)
        found += "".join(stream.put(text[at : at + size], []) for at in range(0, len(text), size))
        assert found + stream.finish() == f"abc{MARKS[name]}"
        stream = MarkedStream(small)  # shown, they are marks or their names
        told = small.decode(ids)
        expected = (
            f"ab{MARKS[small.eos_token]}{small.bos_token}{MARKS[small.eos_token]}c{MARKS[name]}"
        )
        found = stream.put(told, ids)
        assert found + stream.finish() == expected + MARKS[small.eos_token]


def test_without_tokens_for_it_reasoning_is_spelled(small: Tokenizer) -> None:
    ids = {name: i for name, i in small.special_ids.items() if "think" not in name}
    plain = dataclasses.replace(small, special_ids=ids)
    begin, end = MARKS["<think>"], MARKS["</think>"]
    for size in range(1, 12):
        text = "<think>a<th</think>b</thin"
        stream = MarkedStream(plain)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = "".join(stream.put(piece, plain.encode(piece)) for piece in pieces)
        assert found + stream.finish() == f"{begin}a<th{end}b</thin"
