"""Sources that teach nothing are refused, documents that teach nothing are counted aloud.

Oracle: the counts of what each test writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rorqual.data import DataSettings, SourceSettings, TokenizerSettings, build
from rorqual.errors import DataError

Write = Callable[[Path, Iterable[Any]], Path]
USER = {"role": "user", "content": "Who?"}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
SILENT = [
    {"messages": [USER]},
    {"messages": [USER, {"role": "assistant", "content": ""}]},
    {"messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "I think."}]},
    {"text": ""},
    {"text": " \n"},
]
TEACHING = [
    {"messages": [USER, {"role": "assistant", "content": "I."}]},
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
]


def make(folder: Path, *paths: Path, **options: Any) -> None:
    sources = [SourceSettings(path=str(path), **options) for path in paths]
    build(
        DataSettings(folder=str(folder / "t"), sources=sources, held_out=0.0),
        TokenizerSettings(folder=str(folder / "tokenizer"), vocab_size=300),
    )


@pytest.mark.parametrize("suffix", ["empty.txt", "blank.txt", "none.jsonl", "silent.jsonl"])
def test_a_source_without_anything_to_learn_is_refused(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in SILENT)
    text = {"blank.txt": " \n\n", "silent.jsonl": lines}.get(suffix, "")
    (tmp_path / suffix).write_text(text)
    (tmp_path / "good.txt").write_text("A text of some words.\n" * 9)
    with pytest.raises(DataError, match="nothing to learn in this source") as caught:
        make(tmp_path, tmp_path / "good.txt", tmp_path / suffix)
    assert suffix in str(caught.value)
    assert "good.txt" not in str(caught.value)
    assert not (tmp_path / "tokenizer").exists()


def test_documents_that_teach_nothing_are_counted(
    tmp_path: Path, write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "mixed.jsonl", [*SILENT, *TEACHING])
    with caplog.at_level(logging.WARNING, "rorqual"):
        make(tmp_path, path)
    assert "mixed.jsonl: 5 of its 7 documents teach nothing" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rorqual"):
        make(tmp_path, write_jsonl(tmp_path / "good.jsonl", TEACHING))
    assert not caplog.text


def test_a_source_that_its_limits_leave_empty_is_said(
    tmp_path: Path, write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", ["many words of a text"] * 3)
    other = write_jsonl(tmp_path / "other.jsonl", ["few words, which are kept"])
    sources = [
        SourceSettings(path=str(path), max_bytes=3, held_out=0.5),
        SourceSettings(path=str(other)),
    ]
    with caplog.at_level(logging.WARNING, "rorqual"):
        build(
            DataSettings(folder=str(tmp_path / "t"), sources=sources, held_out=0.0),
            TokenizerSettings(folder=str(tmp_path / "tokenizer"), vocab_size=300),
        )
    assert "long.jsonl: none of its 3 documents is kept (2 are duplicates" in caplog.text
    assert "it is one document" not in caplog.text
