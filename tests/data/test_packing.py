"""Conversations packed whole. Oracle: a recount from the raw conversations, turn by turn, through
the chat template; and the fit of every sample.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rorqual.data import Isolation, Loader, packing
from rorqual.data.packing import best_fit
from rorqual.data.shards import FORMAT
from rorqual.errors import DataError
from rorqual.tokenizer import Tokenizer

LENGTH, DEPTH = 64, 2
CAPACITY = LENGTH + 1
Conversation = list[dict[str, Any]]
# A target with all that its document says before it: equal targets of equal contexts are counted.
Target = tuple[int, ...]


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def conversation(rng: random.Random, num_turns: int, has_system: bool, words: int) -> Conversation:
    def text() -> str:
        return " ".join(
            rng.choices(["cat", "sat", "mat", "hello", "good"], k=rng.randint(1, words))
        )

    messages = [said("system", text())] if has_system else []
    for _ in range(num_turns):
        messages += [said("user", text()), said("assistant", text())]
    return messages


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    rng = random.Random(0)
    return [conversation(rng, rng.randint(1, 3), rng.random() < 0.5, 3) for _ in range(120)]


def isolation(tokenizer: Tokenizer, **options: Any) -> Isolation:
    return Isolation(
        tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_id, is_whole=True, **options
    )


def folder(path: Path, encoded: Sequence[tuple[list[int], list[int]]], per_shard: int = 50) -> Path:
    """Shards written by hand, so that the oracle is not the writer; the last one is empty."""
    path.mkdir(parents=True)
    records = []
    shards = [encoded[i : i + per_shard] for i in range(0, len(encoded), per_shard)]
    for number, documents in enumerate([*shards, []]):
        ids = np.array([i for ids, _ in documents for i in ids], dtype="<u2")
        mask = np.array([m for _, mask in documents for m in mask], dtype=np.uint8)
        ids.tofile(path / f"{number:05d}.tokens")
        mask.tofile(path / f"{number:05d}.mask")
        records.append({"name": f"{number:05d}", "num_tokens": len(ids)})
    manifest = {
        "format": FORMAT, "source": path.name, "dtype": "<u2", "has_mask": True,
        "num_tokens": sum(record["num_tokens"] for record in records), "text_bytes": 100,
        "tokenizer": "t", "shards": records,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def targets_of(ids: Sequence[int], mask: Sequence[int]) -> Counter[Target]:
    """Every target of a document, with its beginning."""
    return Counter(tuple(ids[: place + 1]) for place in range(1, len(ids)) if mask[place])


def learnt(loader: Loader, first: int, count: int, world: int = 1) -> Counter[Target]:
    """The main model's targets of `count` samples, as the loss counts them: by hand, token by
    token.
    """
    found: Counter[Target] = Counter()
    for counter in range(first, first + count, world):
        for rank in range(world):
            batch = loader.batch(counter, world, rank, world)
            assert batch.documents_BS is not None
            rows = zip(batch.tokens_BS, batch.mask_BS, batch.documents_BS, strict=True)
            for tokens, mask, documents in rows:
                for place in range(1, LENGTH + 1):
                    number = int(documents[place])
                    if mask[place] and number and documents[place - 1] == number:
                        start = int((documents == number).nonzero()[0])
                        found[tuple(tokens[start : place + 1].tolist())] += 1
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_learns_each_target_once(
    tmp_path: Path, tokenizer: Tokenizer, conversations: list[Conversation], world: int
) -> None:
    encoded = [tokenizer.encode_training(messages) for messages in conversations]
    assert max(len(ids) for ids, _ in encoded) <= CAPACITY
    expected: Counter[Target] = Counter()
    for ids, mask in encoded:
        expected += targets_of(ids, mask)
    path = folder(tmp_path / "a", encoded)
    loader = Loader([(path, 1.0)], LENGTH, DEPTH, seed=1, isolation=isolation(tokenizer))
    size = loader.samples_per_pass // world * world
    counts = loader.packing
    assert counts is not None
    assert (counts.num_targets, counts.num_learnt) == (expected.total(), expected.total())
    assert (counts.num_split, counts.num_cut, counts.num_documents) == (0, 0, len(encoded))
    assert "learns 100 % of" in str(counts)
    assert learnt(loader, 0, size, world) + learnt(
        loader, size, loader.samples_per_pass - size
    ) == (expected)
    second = loader.samples_per_pass
    assert learnt(loader, second, second) == expected
    orders = [[loader.locate(n * second + i) for i in range(second)] for n in range(2)]
    assert orders[0] != orders[1]
    # Best fit wastes little: the lower bound is all tokens side by side.
    least = -(-sum(len(ids) for ids, _ in encoded) // CAPACITY)
    assert least <= second <= 1.1 * least + 1


def test_samples_are_documents_end_to_end_then_padding(
    tmp_path: Path, tokenizer: Tokenizer, conversations: list[Conversation]
) -> None:
    encoded = [tokenizer.encode_training(messages) for messages in conversations]
    whole = Counter(tuple(ids) for ids, _ in encoded)
    path = folder(tmp_path / "a", encoded)
    loader = Loader([(path, 1.0)], LENGTH, DEPTH, isolation=isolation(tokenizer))
    batch = loader.batch(0, loader.samples_per_pass)
    assert batch.documents_BS is not None
    assert batch.tokens_BS.shape[1] == LENGTH + 1 + DEPTH
    found: Counter[Target] = Counter()
    for tokens, mask, documents in zip(
        batch.tokens_BS, batch.mask_BS, batch.documents_BS, strict=True
    ):
        is_real = documents > 0
        num_real = int(is_real.sum())
        assert num_real <= CAPACITY
        assert is_real[:num_real].all()
        assert not mask[num_real:].any()
        steps = documents[:num_real].diff()
        assert documents[0] == 1
        assert ((steps == 0) | (steps == 1)).all()
        for number in range(1, int(documents.max()) + 1):
            found[tuple(tokens[documents == number].tolist())] += 1
    assert found == whole


def test_resume_in_mid_epoch_and_sources_with_weights(
    tmp_path: Path, tokenizer: Tokenizer, conversations: list[Conversation]
) -> None:
    encoded = [tokenizer.encode_training(messages) for messages in conversations]
    a, b = folder(tmp_path / "a", encoded[:80]), folder(tmp_path / "b", encoded[80:])

    def loader() -> Loader:
        return Loader([(a, 1.0), (b, 2.0)], LENGTH, DEPTH, 3, isolation(tokenizer))

    size = loader().samples_per_pass
    whole = torch.cat([loader().batch(n, 4).tokens_BS for n in range(0, 2 * size, 4)])
    resumed = torch.cat([loader().batch(12, 2).tokens_BS, loader().batch(14, 20).tokens_BS])
    assert torch.equal(resumed, whole[12:34])
    expected: Counter[Target] = Counter()
    for number, (ids, mask) in enumerate(encoded):
        for _ in range(1 if number < 80 else 2):
            expected += targets_of(ids, mask)
    assert learnt(loader(), 0, size) == expected
    half = Loader([(a, 0.5)], LENGTH, DEPTH, 3, isolation(tokenizer))
    passes = -(-half.streams[0].num_samples // half.samples_per_pass)
    seen = {half.locate(n)[1] for n in range(passes * half.samples_per_pass)}
    assert seen == set(range(half.streams[0].num_samples))


LONG = [
    said("system", "Be good."),
    *[said(role, f"hello {n} the cat sat") for n in range(8) for role in ("user", "assistant")],
]
NO_ANSWER_BETWEEN = [
    *[said("user", "first"), said("user", "second"), said("assistant", "good " * 12)] * 4,
]


@pytest.mark.parametrize("messages", [LONG, LONG[1:], NO_ANSWER_BETWEEN])
def test_a_long_conversation_is_split_at_turns_with_its_system_message(
    tmp_path: Path, tokenizer: Tokenizer, messages: Conversation
) -> None:
    """Oracle: groups of turns, as many as fit, rendered anew behind the system message."""
    system = [m for m in messages if m["role"] == "system"]
    turns: list[Conversation] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" and (not turns or turns[-1][-1]["role"] == "assistant"):
            turns.append([])
        turns[-1].append(message)
    groups: list[Conversation] = [[*system]]
    for turn in turns:
        if len(tokenizer.encode_training([*groups[-1], *turn])[0]) > CAPACITY:
            groups.append([*system])
        groups[-1] += turn
    assert len(groups) > 1
    expected: Counter[Target] = Counter()
    for group in groups:
        expected += targets_of(*tokenizer.encode_training(group))
    ids, mask = tokenizer.encode_training(messages)
    assert expected.total() == sum(mask)
    path = folder(tmp_path / "a", [(ids, mask)])
    loader = Loader([(path, 1.0)], LENGTH, DEPTH, isolation=isolation(tokenizer))
    assert learnt(loader, 0, loader.samples_per_pass) == expected
    assert loader.packing is not None
    assert (loader.packing.num_split, loader.packing.num_cut) == (1, 0)
    assert "learns 100 % of" in str(loader.packing)
    with pytest.raises(DataError, match="do not fit a sample") as caught:
        Loader([(path, 1.0)], LENGTH, DEPTH, isolation=isolation(tokenizer, splits_long=False))
    assert f"the longest of {len(ids)} tokens" in str(caught.value)


def test_turns_that_just_fit_stay_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two turns fill a sample to its last place; the third has one of its own."""
    system = [said("system", "Be good.")]
    turns = [[said("user", text), said("assistant", text)] for text in ("hello", "cat", "mat")]
    parts = [[*system, *turns[0], *turns[1]], [*system, *turns[2]]]
    full, rest = (tokenizer.encode_training(part)[0] for part in parts)
    whole = tokenizer.encode_training([*system, *turns[0], *turns[1], *turns[2]])
    loader = Loader(
        [(folder(tmp_path / "a", [whole]), 1.0)], len(full) - 1, isolation=isolation(tokenizer)
    )
    rows = loader.batch(0, loader.samples_per_pass).tokens_BS.tolist()
    assert sorted(row[: len(rest)] for row in rows if row != full) == [rest]
    assert full in rows


def test_of_a_turn_that_does_not_fit_the_beginning_is_kept_and_the_rest_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    short = [said("user", "hello"), said("assistant", "good")]
    endless = [
        said("system", "Be good."),
        *short,
        said("user", "more"),
        said("assistant", "cat " * 90),
    ]
    hopeless = [said("user", "cat " * 90), said("assistant", "good")]
    encoded = [tokenizer.encode_training(m) for m in (endless, hopeless, short)]
    turn, turn_mask = tokenizer.encode_training([endless[0], *endless[3:]])
    expected = targets_of(*tokenizer.encode_training(endless[:3]))
    expected += targets_of(turn[:CAPACITY], turn_mask[:CAPACITY]) + targets_of(*encoded[2])
    path = folder(tmp_path / "a", encoded)
    loader = Loader([(path, 1.0)], LENGTH, DEPTH, isolation=isolation(tokenizer))
    assert learnt(loader, 0, loader.samples_per_pass) == expected
    counts = loader.packing
    assert counts is not None
    all_targets = sum(sum(mask) for _, mask in encoded)
    assert (counts.num_targets, counts.num_learnt) == (all_targets, expected.total())
    assert (counts.num_documents, counts.num_split, counts.num_cut) == (3, 2, 2)
    json.dumps(asdict(counts))  # plain numbers: the data's digest is made of them
    assert f"{all_targets - expected.total():,} targets (raise training.sequence_length" in str(
        counts
    )
    assert "100 %" not in str(counts)


def test_texts_beside_conversations_lose_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Each token of a text but the first is a target once, behind at least one other."""
    short = tokenizer.encode_training([said("user", "hello"), said("assistant", "good")])
    texts = [
        [tokenizer.bos_id, *range(100, 100 + length - 2), tokenizer.eos_id]
        for length in (2, CAPACITY - 1, CAPACITY, CAPACITY + 1, 2 * LENGTH + 1, 2 * LENGTH + 2)
    ]
    encoded = [short, *[(ids, [1] * len(ids)) for ids in texts]]
    loader = Loader(
        [(folder(tmp_path / "a", encoded), 1.0)], LENGTH, isolation=isolation(tokenizer)
    )
    found: Counter[int] = Counter()
    for target, count in learnt(loader, 0, loader.samples_per_pass).items():
        assert len(target) >= 2
        found[target[-1]] += count
    expected = Counter(i for ids in texts for i in ids[1:])
    expected += Counter(i for i, m in zip(*short, strict=True) if m)
    assert found == expected
    assert loader.packing is not None
    assert loader.packing.num_targets == loader.packing.num_learnt == expected.total()


@pytest.mark.parametrize("num_cuts", [1, 2])
def test_no_piece_of_a_text_is_without_a_target(
    tmp_path: Path, tokenizer: Tokenizer, num_cuts: int
) -> None:
    """A text that ends just where it is cut: by the closed form, as many full samples as cuts."""
    ids = [tokenizer.bos_id, *range(100, 100 + num_cuts * LENGTH)]
    path = folder(tmp_path / "a", [(ids, [1] * len(ids))])
    loader = Loader([(path, 1.0)], LENGTH, isolation=isolation(tokenizer))
    assert loader.samples_per_pass == num_cuts
    assert loader.packing is not None
    assert loader.packing.num_tokens == loader.packing.num_places == num_cuts * CAPACITY


def test_a_source_that_is_not_read_is_not_counted(
    tmp_path: Path, tokenizer: Tokenizer, conversations: list[Conversation]
) -> None:
    encoded = [tokenizer.encode_training(messages) for messages in conversations]
    a, b = folder(tmp_path / "a", encoded[:40]), folder(tmp_path / "b", encoded[40:])
    alone, beside = (
        Loader(folders, LENGTH, isolation=isolation(tokenizer))
        for folders in ([(a, 1.0)], [(a, 1.0), (b, 0.0)])
    )
    assert alone.packing == beside.packing


def test_isolated_pretraining_keeps_its_samples_and_numbers_their_documents(
    tmp_path: Path, tokenizer: Tokenizer, conversations: list[Conversation]
) -> None:
    """Oracle: the loader without isolation, and a count of the begin ids by hand."""
    encoded = [tokenizer.encode_training(messages) for messages in conversations]
    path = folder(tmp_path / "a", encoded)
    plain = Loader([(path, 1.0)], LENGTH, DEPTH, 7)
    marked = Loader([(path, 1.0)], LENGTH, DEPTH, 7, Isolation(tokenizer.bos_id))
    one, other = (x.batch(0, x.samples_per_pass) for x in (plain, marked))
    assert torch.equal(one.tokens_BS, other.tokens_BS)
    assert torch.equal(one.mask_BS, other.mask_BS)
    assert one.documents_BS is None
    assert other.documents_BS is not None
    last = plain.streams[0].num_samples - 1
    num_tokens = sum(len(ids) for ids, _ in encoded)
    for row, (tokens, documents) in enumerate(
        zip(other.tokens_BS.tolist(), other.documents_BS.tolist(), strict=True)
    ):
        start = marked.locate(row)[1] * LENGTH
        num_real = min(num_tokens - start, LENGTH + 1 + DEPTH)
        assert num_real < len(tokens) or start < last * LENGTH
        number = 1
        for place in range(num_real):
            number += tokens[place] == tokenizer.bos_id and place > 0
            assert documents[place] == number
        assert not any(documents[num_real:])


def test_best_fit_never_overfills_and_is_deterministic() -> None:
    rng = np.random.default_rng(0)
    for lengths in (
        rng.integers(1, 101, 5000),
        np.full(10, 100),
        np.full(3000, 34),
        np.array([100, 1, 99, 50, 50]),
        np.empty(0, dtype=int),
    ):
        bins = best_fit(lengths, 100)
        assert np.array_equal(bins, best_fit(lengths, 100))
        filled = np.bincount(bins, weights=lengths) if len(bins) else np.empty(0)
        assert (filled <= 100).all()
        assert (filled > 0).all()
    assert len(set(best_fit(np.array([100, 1, 99, 50, 50]), 100))) == 3
    assert best_fit(np.full(3000, 34), 100).max() + 1 == 1500


def test_shards_of_another_tokenizer_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder(tmp_path / "a", [([5, 6, 7], [0, 1, 1])])
    with pytest.raises(DataError, match="does not begin with a document"):
        Loader([(path, 1.0)], LENGTH, isolation=isolation(tokenizer))


def test_beginnings_are_found_a_part_at_a_time(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 7 tokens; by hand: 13 documents of 5 fill a sample."""
    monkeypatch.setattr(packing, "SCAN_TOKENS", 7)
    encoded = [([tokenizer.bos_id, 20 + n, 30, 40, 50], [0, 1, 1, 1, 1]) for n in range(30)]
    loader = Loader(
        [(folder(tmp_path / "a", encoded), 1.0)], LENGTH, isolation=isolation(tokenizer)
    )
    assert loader.samples_per_pass == 3
    expected: Counter[Target] = Counter()
    for ids, mask in encoded:
        expected += targets_of(ids, mask)
    assert learnt(loader, 0, 3) == expected


def test_what_cannot_be_learnt_takes_no_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A question without an answer; texts that are long are cut even where conversations may not
    be split.
    """
    asked = tokenizer.encode_training([said("user", "hello")])
    long_text = [tokenizer.bos_id, *range(100, 100 + 2 * LENGTH)]
    encoded = [asked, (long_text, [1] * len(long_text)), asked]
    path = folder(tmp_path / "a", encoded)
    loader = Loader([(path, 1.0)], LENGTH, isolation=isolation(tokenizer, splits_long=False))
    assert loader.samples_per_pass == 2
    assert loader.packing is not None
    assert (loader.packing.num_documents, loader.packing.num_learnt) == (3, 2 * LENGTH)
