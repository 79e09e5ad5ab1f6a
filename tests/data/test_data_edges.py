"""Edges of corpora, settings, shards and plans: what just fits and what no longer does. Oracles: by
hand, or Python's own JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rorqual.config import fill
from rorqual.data import DataSettings, SourceSettings, TokenizerSettings, corpus, shards
from rorqual.data.corpus import Document, num_text_bytes, read_file, write_documents
from rorqual.data.fim import fim_ids, fim_pieces
from rorqual.data.plan import Plan, resolve, select, tokenizer_sample
from rorqual.data.punctuation import PunctuationSplitter
from rorqual.data.selection import DROPPED, HELD_OUT, TRAIN, scan_file
from rorqual.data.shards import DocumentEncoder, ShardSettings, token_dtype
from rorqual.errors import ConfigError, DataError
from rorqual.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
FUNCTION = {"name": "f", "arguments": "{}"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": FUNCTION}]}


def test_a_line_and_a_conversation_may_be_just_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"messages": [*CHAT, CALL]}) + "\n"
    path.write_text("\n" + line + "  \n" + line)
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", len(line))
    monkeypatch.setattr(corpus, "MAX_CONVERSATION_CHARACTERS", len("HiHello!"))
    assert [d.messages for d in read_file(path)] == [[*CHAT, CALL]] * 2
    monkeypatch.setattr(corpus, "MAX_CONVERSATION_CHARACTERS", len("HiHello!") - 1)
    with pytest.raises(DataError, match="too long a conversation") as caught:
        list(read_file(path))
    assert f"{path}:2" in str(caught.value)
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", len(line) - 1)
    with pytest.raises(DataError, match="too long a line"):
        list(read_file(path))


def test_rows_of_parquet_are_counted_over_its_batches(tmp_path: Path) -> None:
    texts = [*["fine"] * 130, None]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        list(read_file(tmp_path / "a.parquet"))
    assert "row 131" in str(caught.value)


def test_what_a_document_holds(tmp_path: Path) -> None:
    for wrong in ({}, {"text": "x", "messages": CHAT}):
        with pytest.raises(DataError, match="either text or messages"):
            Document(**wrong)  # type: ignore[arg-type]
    assert Document(text="").text == ""
    assert num_text_bytes(Document(text="é")) == 2
    words = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "é"}, CALL]
    assert num_text_bytes(Document(messages=words)) == 2
    tools = [{"function": {"name": "f"}}]
    documents = [Document(text="é"), Document(messages=CHAT, tools=tools), Document(messages=CHAT)]
    assert write_documents(tmp_path / "A.JSONL", documents) == (3, 2 + 2 * len("Hello!"))
    records = [json.loads(line) for line in (tmp_path / "A.JSONL").read_text().splitlines()]
    assert records == [{"text": "é"}, {"messages": CHAT, "tools": tools}, {"messages": CHAT}]
    found = list(read_file(tmp_path / "A.JSONL", "me"))
    assert [d.tools for d in found] == [None, tools, None]
    assert {d.source for d in found} == {"me"}
    assert {d.source for d in read_file(tmp_path / "A.JSONL", "")} == {""}


SOURCE = {"name": "wordnet"}
GENERATED = {"name": "generated:x", "max_documents": 1}


@pytest.mark.parametrize(
    ("changes", "source", "is_right"),
    [
        ({"held_out": 0}, {}, True),
        ({"held_out": 1}, {}, False),
        ({"held_out": -0.1}, {}, False),
        ({"fim_rate": 1, "split_punctuation_rate": 1}, {}, True),
        ({"fim_rate": 0, "split_punctuation_rate": 0}, {}, True),
        ({"split_punctuation_rate": 1.1}, {}, False),
        ({"fim_rate": -0.1}, {}, False),
        ({"seed": 2**63 - 1}, {}, True),
        ({"seed": 2**63}, {}, False),
        ({"seed": -1}, {}, False),
        ({}, {"held_out": 0, "epochs": 0, "max_bytes": 1, "max_documents": 1}, True),
        ({}, {"held_out": 1}, False),
        ({}, {"held_out": -0.1}, False),
        ({}, {"epochs": float("inf")}, False),
        ({}, {"max_bytes": 0}, False),
        ({}, {"max_documents": 0}, False),
    ],
)
def test_limits_of_settings(
    changes: dict[str, Any], source: dict[str, Any], is_right: bool
) -> None:
    table = {"folder": "t", "sources": [SOURCE | source], **changes}
    if is_right:
        fill(DataSettings, table, where="recipe.toml")
        return
    with pytest.raises(ConfigError):
        fill(DataSettings, table, where="recipe.toml")


@pytest.mark.parametrize("key", ["vocab_size", "train_bytes"])
def test_a_tokenizer_learns_something_from_something(key: str) -> None:
    assert getattr(fill(TokenizerSettings, {"folder": "t", key: 1}, where="r"), key) == 1
    with pytest.raises(ConfigError):
        fill(TokenizerSettings, {"folder": "t", key: 0}, where="r")


@pytest.mark.parametrize(
    ("table", "label"),
    [
        (SOURCE, "wordnet"),
        (GENERATED, "x"),
        ({"path": "/a/b c/My Text!.jsonl.gz"}, "My-Text-.jsonl.gz"),
        ({"path": "/a/books/"}, "books"),
        ({"path": "/a/*"}, "source"),
        ({"name": "-mine.", "path": "a.txt"}, "mine"),
        ({"name": "generated:y", "path": "a.txt"}, "y"),
    ],
)
def test_the_folder_of_a_source(table: dict[str, Any], label: str) -> None:
    source = fill(SourceSettings, table, where="r")
    assert source.label == label
    assert source.is_generated == (table is GENERATED)
    data = DataSettings(folder="t", sources=[replace(source, epochs=3.0)])
    assert data.folders("held_out") == [(Path("t") / label / "held_out", 3.0)]
    assert data.folders() == [(Path("t") / label / "train", 3.0)]


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(300, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (129_280, "<u4")]
)
def test_the_width_of_tokens(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(name)


def test_batches_are_bounded_by_number_and_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: at most three documents, or as many as reach ten characters."""
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 10)
    sizes = [1, 1, 1, 9, 1, 4, 5, 12, 3]
    documents = (Document(text="x" * size) for size in sizes)
    found = [[len(d.text or "") for d in batch] for batch in shards._batches(documents)]
    assert found == [[1, 1, 1], [9, 1], [4, 5, 12], [3]]
    chats = (Document(messages=CHAT) for _ in range(4))
    assert [len(batch) for batch in shards._batches(chats)] == [3, 1]


def test_what_is_random_depends_on_the_seed(tokenizer: Tokenizer, texts: list[str]) -> None:
    documents = [Document(text=text) for text in texts]
    found = []
    for seed in (1, 1, 2):
        settings = ShardSettings(0.5, 0.0, seed, has_mask=False)
        found.append(list(DocumentEncoder(tokenizer, settings).encode(documents, True)))
    assert found[0] == found[1] != found[2]


def test_a_template_that_does_not_begin_a_conversation(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_token
    for begins in ("", bos + bos, "a" + bos):
        template = begins.replace(bos, "{{ bos_token }}")
        template += "{% for m in messages %}{{ m.content }}{% endfor %}"
        encoder = DocumentEncoder(
            replace(tokenizer, chat_template=template), ShardSettings(0, 0, 0, has_mask=True)
        )
        with pytest.raises(DataError, match="only begin-of-sentence"):
            list(encoder.encode([Document(messages=CHAT)], is_training=True))


def test_pieces_begin_and_end_anywhere(tokenizer: Tokenizer) -> None:
    """Each of the six ways to cut two letters twice; tokens to mark them are needed."""
    ways = {fim_pieces("ab", random.Random(seed)) for seed in range(200)}
    cuts = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert ways == {("ab"[:i], "ab"[i:j], "ab"[j:]) for i, j in cuts}
    for name in ("fim▁begin", "fim▁hole", "fim▁end"):
        ids = {k: v for k, v in tokenizer.special_ids.items() if name not in k}
        with pytest.raises(DataError, match="no fill-in-the-middle tokens"):
            fim_ids([], [], [], replace(tokenizer, special_ids=ids))
    assert PunctuationSplitter(tokenizer, 1.0).split([], random.Random(0)) == []


def text_plan(folder: Path, *sizes: int, suffix: str = ".txt", **options: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}{suffix}" for number in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_text("x" * size)
    return Plan(SourceSettings(name="a", path=str(folder), **options), files, "MIT")


def test_blocks_are_a_64th_within_bounds(tmp_path: Path) -> None:
    for sizes, block in (
        ((100,), 256),
        ((256 * 64,), 256),
        ((257 * 64,), 257),
        ((100 * 64, 200 * 64 + 63), 300),
        ((65_536 * 64,), 65_536),
        ((65_537 * 64,), 65_536),
    ):
        assert text_plan(tmp_path / "t", *sizes).block_characters == block
    assert text_plan(tmp_path / "u", 300 * 64, suffix=".TXT").block_characters == 300
    assert text_plan(tmp_path / "j", 300 * 64, suffix=".jsonl").block_characters == 256


def lines_plan(path: Path, texts: list[str], **options: Any) -> Plan:
    write_documents(path, [Document(text=text) for text in texts])
    return Plan(SourceSettings(name=path.stem, path=str(path), **options), [path], "MIT")


def test_each_source_has_its_own_share_and_limits(tmp_path: Path) -> None:
    """The second's share is its own; what is generated is held out only where that is asked for,
    and its number is not cut again.
    """
    words = [[f"{name} {n:03}" for n in range(200)] for name in "abcd"]
    made = {"name": "generated:c", "max_documents": 5}
    plans = [
        lines_plan(tmp_path / "a.jsonl", words[0]),
        lines_plan(tmp_path / "b.jsonl", [*words[1], *words[0][:3]], held_out=0.5, max_bytes=505),
        lines_plan(tmp_path / "c.jsonl", words[2]),
        lines_plan(tmp_path / "d.jsonl", words[3]),
    ]
    plans[2] = replace(plans[2], settings=SourceSettings(**made))
    plans[3] = replace(plans[3], settings=SourceSettings(**made, held_out=0.5, max_bytes=1000))
    scans = [scan_file(plan.files[0]) for plan in plans]
    data = DataSettings(folder="t", sources=[plans[0].settings], held_out=0.1)
    codes, duplicates = select(plans, scans, data)
    kept = [[int((code == kind).sum()) for kind in (TRAIN, HELD_OUT, DROPPED)] for code in codes]
    assert duplicates == [0, 3, 0, 0]
    assert kept[0][2] == 0
    assert 5 <= kept[0][1] <= 40
    assert sum(kept[1][:2]) == 101
    assert kept[1][2] == 102
    assert 25 <= kept[1][1] <= 75
    assert kept[2] == [200, 0, 0]
    assert kept[3][2] == 0
    assert 60 <= kept[3][1] <= 140


def test_the_tokenizers_sample_is_of_training_texts(tmp_path: Path) -> None:
    """All of it, or about a half of each source; TRAIN is every third from the second on."""
    a = lines_plan(tmp_path / "a.jsonl", [f"a {n:03}" for n in range(400)])
    more = lines_plan(tmp_path / "a2.jsonl", [f"e {n:03}" for n in range(400)])
    b = lines_plan(tmp_path / "b.jsonl", [f"b {n:03}" for n in range(800)])
    write_documents(tmp_path / "c.jsonl", [Document(messages=[*CHAT, CALL])])
    c = Plan(SourceSettings(name="c", path="c"), [tmp_path / "c.jsonl"], "MIT")
    plans = [replace(a, files=[*a.files, *more.files]), b, c]
    scans = [scan_file(file) for plan in plans for file in plan.files]
    codes = [np.arange(len(scan.hashes)) % 3 for scan in scans]
    codes[-1][:] = TRAIN
    whole = list(tokenizer_sample(plans, scans, codes, 10**6, seed=0))
    sizes = {"a": 400, "e": 400, "b": 800}
    chosen = [f"{name} {n:03}" for name, size in sizes.items() for n in range(1, size, 3)]
    assert whole == [*chosen, "Hi", "Hello!", ""]
    size = 5 * len(chosen)
    half = list(tokenizer_sample(plans, scans, codes, size // 2, seed=0))
    assert half == list(tokenizer_sample(plans, scans, codes, size // 2, seed=0))
    assert half != list(tokenizer_sample(plans, scans, codes, size // 2, seed=1))
    for names in (("a ", "e "), ("b ",)):
        share = sum(t.startswith(names) for t in half) / sum(t.startswith(names) for t in chosen)
        assert 0.4 < share < 0.6
    assert set(half) <= set(whole)


def test_what_is_generated_is_written_once_for_each_of_its_forms(tmp_path: Path) -> None:
    """The seed, the number and the first documents tell the files apart."""

    def generator(words: str) -> Any:
        def make(seed: int, count: int) -> Iterator[Document]:
            yield from (Document(text=f"{words} {seed} {n}") for n in range(10**9))

        return {"x": make}

    source = SourceSettings(name="generated:x", max_documents=70)
    data = DataSettings(folder=str(tmp_path), sources=[source])
    plan = resolve(data, source, generator("a"))
    assert plan.licence == "generated"
    [file] = plan.files
    assert [d.text for d in read_file(file)] == [f"a 0 {n}" for n in range(70)]
    file.write_bytes(b"kept")
    assert resolve(data, source, generator("a")).files == [file]
    assert file.read_bytes() == b"kept"
    others = [
        resolve(data, source, generator("b")),
        resolve(replace(data, seed=1), source, generator("a")),
        resolve(data, replace(source, max_documents=71), generator("a")),
    ]
    assert len({file, *(other.files[0] for other in others)}) == 4
    with pytest.raises(DataError, match="gave nothing"):
        resolve(data, source, {"x": lambda seed, count: iter(())})


def test_the_licence_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for options, licence in (({}, "not stated"), ({"licence": "MIT"}, "MIT")):
        source = SourceSettings(path=str(tmp_path / "a.txt"), **options)
        data = DataSettings(folder="t", sources=[source])
        assert resolve(data, source, {}).licence == licence
