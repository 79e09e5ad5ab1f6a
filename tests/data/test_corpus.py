"""Readers against files written by pyarrow, gzip and json; every broken file names its place and
mend.
"""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.data import corpus
from rorqual.data.corpus import (
    Document,
    corpus_files,
    cut_blocks,
    read_file,
    write_documents,
)
from rorqual.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def read_documents(path: Path, source: str = "") -> Iterator[Document]:
    """The documents of a file or a folder."""
    for file in corpus_files(path):
        yield from read_file(file, source)


def test_jsonl_and_gzip_agree_with_json(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": t, "id": 3}) + "\n\n" for t in ("one", "zwei ü", "三"))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    documents = list(read_documents(tmp_path, "mine"))
    assert [d.text for d in documents] == ["one", "zwei ü", "三"] * 2
    assert {d.source for d in documents} == {"mine"}


def test_parquet_agrees_with_pyarrow(tmp_path: Path) -> None:
    texts = [f"row {n}" for n in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": texts}), tmp_path / "t.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "m.parquet")
    assert [d.text for d in read_documents(tmp_path / "t.parquet")] == texts
    assert next(read_documents(tmp_path / "m.parquet")).messages == CHAT


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n\nline\n")
    (tmp_path / "empty.txt").write_text("")
    assert [d.text for d in read_documents(tmp_path)] == ["line\n\nline\n"]


def test_long_text_is_cut_at_blank_lines_lines_and_spaces(tmp_path: Path) -> None:
    whole = "a paragraph\n\nanother one\nof lines without end\nand one of words only " + "x" * 50
    (tmp_path / "a.txt").write_text(whole)
    documents = list(read_file(tmp_path / "a.txt", block_characters=12))
    texts = [d.text or "" for d in documents]
    assert "".join(texts) == whole
    assert texts[:2] == ["a paragraph\n\n", "another one\n"]
    assert texts[-1] == "x" * 7
    assert all(12 <= len(text) <= 24 for text in texts[:-1])
    assert [d.is_continued for d in documents] == [False, *[True] * (len(texts) - 1)]


@given(st.lists(st.text("ab \n", max_size=40), max_size=6), st.integers(1, 12))
def test_blocks_are_the_text(chunks: list[str], size: int) -> None:
    blocks = list(cut_blocks(chunks, size))
    assert "".join(blocks) == "".join(chunks)
    assert all(size <= len(block) <= 2 * size for block in blocks[:-1])


def test_memory_is_bounded_whatever_the_file_is_like(tmp_path: Path) -> None:
    """Oracle: tracemalloc, for 24 MB without a line break and as lines without a blank one."""
    size = 24_000_000
    (tmp_path / "line.txt").write_text("word " * (size // 5))
    (tmp_path / "lines.txt").write_text("a line of text\n" * (size // 15))
    for name in ("line.txt", "lines.txt"):
        tracemalloc.start()
        length = sum(len(document.text or "") for document in read_file(tmp_path / name))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert length == (tmp_path / name).stat().st_size
        assert peak < 8 * corpus.MAX_TEXT_CHARACTERS, name


def test_lines_and_conversations_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "' + "x" * (4 << 20) + '"}\n')
    tracemalloc.start()
    with pytest.raises(DataError, match="too long a line") as caught:
        list(read_documents(path))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert f"{path}:2" in str(caught.value)
    monkeypatch.setattr(corpus, "MAX_CONVERSATION_CHARACTERS", 6)
    path.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(DataError, match="too long a conversation"):
        list(read_documents(path))


def test_long_texts_of_lines_and_rows_come_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_TEXT_CHARACTERS", 10)
    text = "one two three four five six seven"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "x"}))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text, "x"]}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        *parts, last = read_documents(tmp_path / name)
        assert "".join(d.text or "" for d in parts) == text
        assert [d.is_continued for d in parts] == [False, True, True]
        assert (last.text, last.is_continued) == ("x", False)


def test_glob_folder_and_hidden_files(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a/y.txt", ".hidden/z.txt", "a/note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [f.name for f in corpus_files(tmp_path)] == ["y.txt", "x.txt"]
    assert [f.name for f in corpus_files(f"{tmp_path}/*/x.*")] == ["x.txt"]
    # What is named is meant, and so is all in it, wherever it lies.
    assert [f.name for f in corpus_files(tmp_path / ".hidden")] == ["z.txt"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "ok"', "not valid JSON"),
        ('["text"]', "not a JSON object"),
        ('{"txt": "x"}', "neither text nor messages"),
        ('{"text": 3}', "text is not a string"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"messages": []}', "the conversation is empty"),
        ('{"messages": "hi"}', "the conversation is not a list"),
        ('{"messages": ["hi"]}', r"messages\[0\]: is not an object"),
        ('{"messages": [{"content": "x"}]}', r"messages\[0\]: has an unknown role"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]: has no text in 'content'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', r"messages\[0\].* surrogate"),
        ('{"text": "x", "messages": [{"role": "user", "content": "x"}]}', "both"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=words) as caught:
        list(read_documents(path))
    assert f"{path}:2" in str(caught.value)
    assert caught.value.fix


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    broken = {
        "cut.jsonl.gz": whole[:-20],
        "plain.jsonl.gz": b'{"text": "x"}\n',
        "latin.txt": b"caf\xe9",
        "latin.jsonl": b'{"text": "caf\xe9"}\n',
        "not.parquet": b"PAR1 no",
    }
    for name, raw in broken.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError) as caught:
            list(read_documents(tmp_path / name))
        assert name in str(caught.value)
        assert caught.value.fix
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "columns.parquet")
    with pytest.raises(DataError, match="no column of text"):
        list(read_documents(tmp_path / "columns.parquet"))


def test_missing_and_unreadable_paths(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    for path, words in (("none.txt", "no such file"), ("empty", "no corpus"), ("a.pdf", "kind of")):
        with pytest.raises(DataError, match=words):
            corpus_files(tmp_path / path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_written_documents_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("round") / "d.jsonl.gz"
    documents = [Document(text=text) for text in texts] + [Document(messages=CHAT)]
    count, text_bytes = write_documents(path, documents)
    assert count == len(documents)
    assert text_bytes == sum(len(text.encode()) for text in texts) + len("Hello!")
    assert [d.as_record() for d in read_documents(path)] == [d.as_record() for d in documents]
    first = path.read_bytes()
    write_documents(path, documents)
    assert path.read_bytes() == first


USER = {"role": "user", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]: has an unknown role"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, r"messages\[1\]: is a tool's"),
        ({"messages": [USER, CALL]}, r"tool_calls\[0\]: has no 'arguments'"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, r"tools\[0\]: is not a function"),
        ({"messages": [USER], "tools": {"name": "f"}}, "tools: is not a list"),
        ({"messages": [USER], "tools": 7}, "tools: is not a list"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "neither text nor messages"),
    ],
)
def test_a_faulty_conversation_names_file_line_and_mend(
    tmp_path: Path, record: object, message: str
) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": [USER]}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(file))
    assert str(caught.value).startswith(f"{file}:2: ")
    assert "docs/own-data.md" in str(caught.value.fix) or "ShareGPT" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    """At the beginning of a file; elsewhere it is a character as others."""
    lines = "one\ufeff\n" if name == "a.txt" else json.dumps({"text": "one\ufeff\n"}) + "\n"
    raw = b"\xef\xbb\xbf" + lines.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert [d.text for d in read_file(tmp_path / name)] == ["one\ufeff\n"]


def test_a_folder_of_other_files_says_what_lies_there_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "GPL-3").write_text("A licence.")
    with pytest.raises(DataError, match="no corpus files here") as caught:
        corpus_files(tmp_path)
    assert caught.value.found == "GPL-3"
    with pytest.raises(DataError, match="not a kind of file") as named:
        corpus_files(tmp_path / "GPL-3")
    for problem in (caught, named):
        assert "NAME.txt" in str(problem.value.fix)
        assert "docs/own-data.md" in str(problem.value.fix)
