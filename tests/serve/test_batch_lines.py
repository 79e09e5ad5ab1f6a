"""A batch of any length takes little memory. Oracle: what Python itself says it has allocated."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import opened

from rorqual.serve.batch_lines import Lines, check_lines, record_of
from rorqual.serve.errors import ApiError
from rorqual.serve.offline import read_body
from rorqual.serve.store import NewFile, Store

CHAT = "/v1/chat/completions"
NUM_LINES, LINE_BYTES = 4000, 2500
SPARE_BYTES = 1 << 20
"""What the work may take: a tenth of the file. A set of 50,000 ids' digests is 7 MiB."""


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "q" * (LINE_BYTES - 200)}]}
    with path.open("w", encoding="utf-8") as file:
        for number in range(NUM_LINES):
            request = {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(request) + "\n" * (1 + number % 2))
    assert path.stat().st_size > 9 * SPARE_BYTES
    return path


def test_lines_are_checked_one_by_one(long_file: Path) -> None:
    found = []
    peak = peak_of(lambda: found.append(check_lines(long_file, CHAT, 4000)))
    assert found == [(NUM_LINES, [])]
    assert peak < SPARE_BYTES


def test_lines_come_one_by_one_without_those_that_are_answered(long_file: Path) -> None:
    """A line's number is that in the file: every second one is followed by an empty one."""
    seen: list[int] = []
    expected = [n + n // 2 + 1 for n in range(NUM_LINES)]

    async def read() -> None:
        lines = Lines(long_file, set(expected[:500]))
        while (found := await lines.next()) is not None:
            number, line = found
            assert expected[int(line.custom_id)] == number
            seen.append(number)

    peak = peak_of(lambda: asyncio.run(read()))
    assert seen == expected[500:]
    assert peak < SPARE_BYTES


def test_answers_become_a_file_one_by_one_and_their_room_is_given_back(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as store:
        answers = (("b", number, 1, b"a" * LINE_BYTES) for number in range(NUM_LINES))
        store.database.do(
            lambda connection: connection.executemany(
                "INSERT INTO answers (batch_id, line, is_good, record) VALUES (?, ?, ?, ?)", answers
            )
        )
        num_full = _num_pages(store)

        def write() -> None:
            records = store.batches.records(store.database, "b", True)
            staged = store.files.stage(records, NewFile(name="out", owner="me"))
            assert staged.bytes == NUM_LINES * LINE_BYTES
            store.forget("b")

        assert peak_of(write) < SPARE_BYTES
        assert _num_pages(store) < num_full / 20


def _num_pages(store: Store) -> int:
    [row] = store.database.rows("PRAGMA page_count")
    return int(row[0])


@pytest.mark.parametrize("text", ["one\u2028two\u0085three", 'quotes " and \\', "half \\ud800"])
def test_a_record_is_one_line_for_every_reader(text: str) -> None:
    """Python splits texts at more than line feeds; half a surrogate pair has no UTF-8."""
    value = json.loads(f'"{text}"') if "ud800" in text else text
    raw = record_of(value, 200, json.dumps({"said": value}), [])
    assert raw.endswith(b"\n")
    [line] = raw.decode().splitlines()
    said = json.loads(line)["response"]["body"]["said"]
    assert said == (value if "ud800" not in text else "half ?")


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("start", [MARK, MARK + b"\r\n", MARK + b" \n\n"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path, start: bytes) -> None:
    """Oracle: the same file without it."""
    body = {"messages": [{"role": "user", "content": "\ufeffq"}]}
    request = {"custom_id": "1", "method": "POST", "url": CHAT, "body": body}
    path = tmp_path / "in.jsonl"
    line = json.dumps(request, ensure_ascii=False).encode()
    path.write_bytes(start + line)
    assert check_lines(path, CHAT, 4000) == (1, [])
    found = asyncio.run(Lines(path, set()).next())
    assert found is not None
    assert found[0] == 1 + start.count(b"\n")
    assert found[1].model_dump() == request
    path.write_bytes(line + b"\n" + MARK + line)
    assert [fault.line for fault in check_lines(path, CHAT, 4000)[1]] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the line is not valid JSON: EOF while parsing an object at line 1 column 1"),
        ("[1]", "the line must be a JSON object"),
        ("7", "the line must be a JSON object"),
    ],
)
def test_a_fault_speaks_of_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text, encoding="utf-8")
    assert [fault.message for fault in check_lines(path, CHAT, 4000)[1]] == [message]


def test_a_body_that_is_no_object_is_told_without_a_class() -> None:
    for route in ("/v1/chat/completions", "/v1/completions"):
        with pytest.raises(ApiError, match="the body must be a JSON object"):
            read_body(route, "x")
