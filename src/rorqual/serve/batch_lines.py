"""The lines of a batch's input file, and the records that answer them."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from pydantic import ValidationError

from rorqual.serve.errors import validation_error
from rorqual.serve.reply_text import LINE_ENDS, new_id
from rorqual.serve.schemas_batches import BatchError, BatchLine

MAX_LINES = 50_000
MAX_SHOWN_FAULTS = 20


class Lines:
    """The lines of a file that have no answer yet, one after the other.

    The file is open only while a line is read: a thousand batches may wait.
    """

    def __init__(self, path: Path, answered: Set[int]) -> None:
        self._path, self._answered = path, answered
        self._offset = self._number = 0
        self._lock = asyncio.Lock()

    async def next(self) -> tuple[int, BatchLine] | None:
        """A line and its number from 1. OSError if the file is gone."""
        async with self._lock:
            return await asyncio.to_thread(self._next)

    def _next(self) -> tuple[int, BatchLine] | None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while raw := file.readline():
                self._offset, self._number = self._offset + len(raw), self._number + 1
                line = _without_mark(raw, self._number)
                if line.strip() and self._number not in self._answered:
                    return self._number, BatchLine.model_validate_json(line)
        return None


def check_lines(path: Path, endpoint: str, max_bytes: int) -> tuple[int, list[BatchError]]:
    """How many requests a file has, and what is wrong with it, by line."""
    faults: list[BatchError] = []
    seen: set[bytes] = set()
    num_lines = 0
    for number, line in _numbered(path):
        num_lines += 1
        fault = fault_of(line, endpoint, seen, max_bytes)
        if fault is not None:
            faults.append(fault.model_copy(update={"line": number}))
        if len(faults) >= MAX_SHOWN_FAULTS or num_lines > MAX_LINES:
            break
    if not num_lines:
        faults.append(BatchError(code="empty_file", message="the file has no requests"))
    if num_lines > MAX_LINES:
        message = f"the file has more than {MAX_LINES} requests"
        faults.append(BatchError(code="too_many_requests", message=message))
    return num_lines, faults


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1, without blank lines."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if (line := _without_mark(raw, number)).strip():
                yield number, line


def _without_mark(raw: bytes, number: int) -> bytes:
    """A byte order mark, with which some editors begin a file, is no part of its first line."""
    return raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def fault_of(raw: bytes, endpoint: str, seen: set[bytes], max_bytes: int) -> BatchError | None:
    """What makes the line no request; `seen` has digests of the ids before it.

    What is wrong with a request's body is no fault of the file: it is the line's answer.
    """
    if len(raw) > max_bytes:
        message = f"the line is longer than this server's limit of {max_bytes} bytes"
        return BatchError(code="line_too_long", message=message)
    try:
        line = BatchLine.model_validate_json(raw)
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
