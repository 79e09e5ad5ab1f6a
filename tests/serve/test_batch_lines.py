"""A batch of any length takes little memory, and none keeps others waiting. Oracles: what Python
itself says it has allocated; values counted by hand.
"""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import opened

from rorqual.serve.batch_lines import (
    MAX_LINES_AND_BLANKS,
    STRETCH_BYTES,
    STRETCH_VALUES,
    FileCheck,
    Lines,
    record_of,
)
from rorqual.serve.errors import ApiError
from rorqual.serve.json_values import MAX_VALUES, num_marks
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
    check = FileCheck(long_file, CHAT, 4000, 100)

    def work() -> None:
        while not check.is_done:
            check.go_on()

    peak = peak_of(work)
    assert (check.num_lines, check.faults) == (NUM_LINES, [])
    assert peak < SPARE_BYTES


def test_lines_come_one_by_one_without_those_that_are_answered(long_file: Path) -> None:
    """A line's number is that in the file: every second one is followed by an empty one."""
    seen: list[int] = []
    expected = [n + n // 2 + 1 for n in range(NUM_LINES)]

    async def read() -> None:
        lines = Lines(long_file, set(expected[:500]))
        while (found := await lines.next()) is not None:
            number, raw = found
            assert expected[int(json.loads(raw)["custom_id"])] == number
            seen.append(number)

    peak = peak_of(lambda: asyncio.run(read()))
    assert seen == expected[500:]
    assert peak < SPARE_BYTES


def checked(path: Path, content: bytes, max_values: int = 100) -> FileCheck:
    path.write_bytes(content)
    check = FileCheck(path, CHAT, 1 << 24, max_values)
    while not check.is_done:
        check.go_on()
    return check


def test_a_line_has_no_more_values_than_a_body(tmp_path: Path) -> None:
    """Counted before anybody parses it; inside of texts they are none."""
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": [",,,,,", [0] * 93]}
    exact = json.dumps(line).encode()
    assert checked(tmp_path / "a", exact).faults == []
    [fault] = checked(tmp_path / "a", exact.replace(b"0, ", b"0, 0, ", 1)).faults
    assert (fault.code, fault.line) == ("too_many_values", 1)
    assert fault.message == "the line has 101 values; this server parses at most 100"
    [fault] = checked(tmp_path / "a", exact.decode().encode("utf-16-le")).faults
    assert fault.code == "invalid_json"


def test_blank_lines_have_an_end_too(tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {}}
    content = json.dumps(line).encode() + b"\n" * MAX_LINES_AND_BLANKS
    assert checked(tmp_path / "a", content).faults == []
    check = checked(tmp_path / "a", content + b" \n" * 10 * MAX_LINES_AND_BLANKS)
    assert [fault.code for fault in check.faults] == ["too_many_lines"]


@pytest.mark.parametrize("text", ["a" * 1000, ",".join("0" * 5000)])
def test_a_file_is_checked_a_stretch_at_a_time(tmp_path: Path, text: str) -> None:
    """In between others come; what it says of itself is what it has checked."""
    num_lines = 1000 if text[0] == "a" else 20
    body = json.dumps(text) if text[0] == "a" else f"[{text}]"
    line = f'{{"custom_id": "NAME", "method": "POST", "url": "{CHAT}", "body": {body}}}'
    content = "\n".join(line.replace("NAME", str(n)) for n in range(num_lines)).encode()
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    check = FileCheck(path, CHAT, 1 << 24, MAX_VALUES)
    steps = []
    while not check.is_done:
        steps.append(check.go_on())
    assert (check.num_lines, check.faults) == (num_lines, [])
    assert sum(num_bytes for num_bytes, _ in steps) == len(content)
    assert sum(num_values for _, num_values in steps) == num_marks(content)
    assert len(steps) > 3
    assert all(num_bytes < STRETCH_BYTES + len(line) + 9 for num_bytes, _ in steps)
    assert all(num_values < STRETCH_VALUES + len(line) for _, num_values in steps)


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
    check = checked(path, start + line)
    assert (check.num_lines, check.faults) == (1, [])
    found = asyncio.run(Lines(path, set()).next())
    assert found is not None
    assert found[0] == 1 + start.count(b"\n")
    assert json.loads(found[1]) == request
    again = line + b"\n" + MARK + line
    assert [fault.line for fault in checked(path, again).faults] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the line is not valid JSON: EOF while parsing an object at line 1 column 1"),
        ("[1]", "the line must be a JSON object"),
        ("7", "the line must be a JSON object"),
    ],
)
def test_a_fault_speaks_of_the_line(tmp_path: Path, text: str, message: str) -> None:
    check = checked(tmp_path / "in.jsonl", text.encode())
    assert [fault.message for fault in check.faults] == [message]


def test_a_body_that_is_no_object_is_told_without_a_class() -> None:
    for route in ("/v1/chat/completions", "/v1/completions"):
        with pytest.raises(ApiError, match="the body must be a JSON object"):
            read_body(route, "x")
