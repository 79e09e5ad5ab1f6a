"""The lines of a batch's input file, and the records that answer them."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
from collections.abc import Sequence, Set
from pathlib import Path

from pydantic import ValidationError

from rorqual.serve.errors import ApiError, validation_error
from rorqual.serve.json_values import MAX_VALUES, check_values, num_marks
from rorqual.serve.reply_text import LINE_ENDS, new_id
from rorqual.serve.schemas_batches import BatchError, BatchLine

MAX_LINES = 50_000
MAX_LINES_AND_BLANKS = 2 * MAX_LINES
STRETCH_BYTES, STRETCH_VALUES = 1 << 18, 10_000
"""Of a file that are checked before others come."""
MAX_SHOWN_FAULTS = 20


class Lines:
    """The lines of a file that have no answer yet, one after the other.

    The file is open only while a line is read: a thousand batches may wait.
    """

    def __init__(self, path: Path, answered: Set[int]) -> None:
        self._path, self._answered = path, answered
        self._offset = self._number = 0
        self._lock = asyncio.Lock()

    async def next(self) -> tuple[int, bytes] | None:
        """A line and its number from 1. OSError if the file is gone."""
        async with self._lock:
            return await asyncio.to_thread(self._next)

    def _next(self) -> tuple[int, bytes] | None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while raw := file.readline():
                self._offset, self._number = self._offset + len(raw), self._number + 1
                line = _without_mark(raw, self._number)
                if line.strip() and self._number not in self._answered:
                    return self._number, line
        return None


class FileCheck:
    """How many requests a file has, and what is wrong with it, by line.

    It goes on by a stretch at a time, so that others come in between: whoever parses holds Python's
    lock, in whatever thread.
    """

    def __init__(self, path: Path, endpoint: str, max_bytes: int, max_values: int) -> None:
        self._path, self._endpoint = path, endpoint
        self._max_bytes, self._max_values = max_bytes, max_values
        self._seen: set[bytes] = set()
        self._offset = self._number = 0
        self.num_lines = 0
        self.faults: list[BatchError] = []
        self.is_done = False

    def go_on(self) -> tuple[int, int]:
        """The bytes and the values that it has checked."""
        num_bytes = num_values = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while num_bytes < STRETCH_BYTES and num_values < STRETCH_VALUES and not self.is_done:
                raw = file.readline()
                self._offset, num_bytes = self._offset + len(raw), num_bytes + len(raw)
                num_values += num_marks(raw)
                if raw:
                    self._take(raw)
                else:
                    self._end()
        return num_bytes, num_values

    def _take(self, raw: bytes) -> None:
        self._number += 1
        if (line := _without_mark(raw, self._number)).strip():
            self.num_lines += 1
            fault = fault_of(line, self._endpoint, self._seen, self._max_bytes, self._max_values)
            if fault is not None:
                self.faults.append(fault.model_copy(update={"line": self._number}))
        is_long = self.num_lines > MAX_LINES or self._number > MAX_LINES_AND_BLANKS
        if len(self.faults) >= MAX_SHOWN_FAULTS or is_long:
            self._end()

    def _end(self) -> None:
        self.is_done = True
        if self.num_lines > MAX_LINES:
            message = f"the file has more than {MAX_LINES} requests"
            self.faults.append(BatchError(code="too_many_requests", message=message))
        elif self._number > MAX_LINES_AND_BLANKS:
            message = f"the file has more than {MAX_LINES_AND_BLANKS} lines, blank ones included"
            self.faults.append(BatchError(code="too_many_lines", message=message))
        elif not self.num_lines:
            self.faults.append(BatchError(code="empty_file", message="the file has no requests"))


def _without_mark(raw: bytes, number: int) -> bytes:
    """A byte order mark, with which some editors begin a file, is no part of its first line."""
    return raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def fault_of(
    raw: bytes, endpoint: str, seen: set[bytes], max_bytes: int, max_values: int = MAX_VALUES
) -> BatchError | None:
    """What makes the line no request; `seen` has digests of the ids before it.

    What is wrong with a request's body is no fault of the file: it is the line's answer.
    """
    if len(raw) > max_bytes:
        message = f"the line is longer than this server's limit of {max_bytes} bytes"
        return BatchError(code="line_too_long", message=message)
    try:
        check_values(raw, max_values)
        line = BatchLine.model_validate_json(raw)
    except ApiError as problem:
        message = problem.message.replace("the body", "the line")
        return BatchError(code=problem.code or "invalid_line", message=message)
    except ValidationError as problem:
        error = validation_error(problem.errors(), list(BatchLine.model_fields), "the line")
        return BatchError(code="invalid_line", message=error.message, param=error.param)
    if line.url != endpoint:
        message = f"the url is not the batch's endpoint {endpoint}"
        return BatchError(code="mismatched_url", message=message, param="url")
    digest = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
    if digest in seen:
        message = f"custom_id {line.custom_id[:80]!r} is there twice"
        return BatchError(code="duplicate_custom_id", message=message, param="custom_id")
    seen.add(digest)
    return None


def record_of(custom_id: str, status: int, body: str, ignored: Sequence[str]) -> bytes:
    """A line of the output: one line for every reader, also those that split at U+2028."""
    response = {"status_code": status, "request_id": new_id("req_"), "body": json.loads(body)}
    if ignored:
        response["ignored_fields"] = ignored
    record = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response}
    text = json.dumps(record | {"error": None}, ensure_ascii=False).translate(LINE_ENDS)
    return (text + "\n").encode(errors="replace")
