"""Documents and the files they are read from: txt, jsonl, jsonl.gz, parquet; a file, a folder or a
glob.

Every reader streams in bounded memory: a text longer than a mebi-character comes in blocks, each of
which but the first `is_continued`; a line or a conversation that is too long is an error.

A broken file or line is a DataError that names the place and the mend: text that is silently
skipped would change the data, and with it every number measured on it.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rorqual.data.record_checks import check_conversation, check_text, mend_of_keys
from rorqual.errors import DataError, listing
from rorqual.files import NOT_JSON, atomic_write

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
MAX_TEXT_CHARACTERS = 1 << 20  # a longer text is cut, so that memory stays bounded
MAX_CONVERSATION_CHARACTERS = 1 << 22  # which cannot be cut
MAX_LINE_BYTES = 1 << 26
PAGE = "docs/own-data.md"
PARQUET_BATCH_ROWS = 64
READ_CHARACTERS = 1 << 16

Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One document: either `text`, or the `messages` of a conversation ({"role", "content"}).

    `is_continued`: this text goes on where the document before it ended.
    """

    text: str | None = None
    messages: list[Message] | None = None
    source: str = ""
    tools: list[dict[str, Any]] | None = None
    is_continued: bool = False

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise DataError(
                "a document has either text or messages",
                where=self.source or None,
                found="both" if self.text is not None else "neither",
                fix='give one of "text" and "messages"',
            )

    def as_record(self) -> dict[str, Any]:
        """The JSON object that a line of a jsonl file holds."""
        if self.text is not None:
            return {"text": self.text}
        record: dict[str, Any] = {"messages": self.messages}
        return record | {"tools": self.tools} if self.tools else record


def document_from_record(record: object, source: str, where: object) -> Document:
    """Checks a {"text": str} or {"messages": [{"role", "content"}, ...]} object; other keys are
    ignored.
    """
    if not isinstance(record, dict):
        raise DataError(
            "is not a JSON object",
            where=where,
            found=type(record).__name__,
            expected='{"text": "..."} or {"messages": [...]}',
            fix="correct or remove the line",
        )
    text, messages = record.get("text"), record.get("messages")
    if text is None and messages is None:
        raise DataError(
            "has neither text nor messages",
            where=where,
            found=f"keys {listing(list(record))}",
            expected='"text" or "messages"',
            fix=mend_of_keys(record),
        )
    if text is not None and messages is not None:
        raise DataError(
            "has both text and messages",
            where=where,
            expected="one of them",
            fix='remove "text" from a conversation or "messages" from a text',
        )
    if text is not None:
        check_text(text, "text", where)
        return Document(text=text, source=source)
    tools = record.get("tools") or None
    check_conversation(messages, tools, where)
    return Document(messages=messages, source=source, tools=tools)


def corpus_files(pattern: str | os.PathLike[str]) -> list[Path]:
    """The corpus files of a file name, a folder (searched through) or a glob, sorted by name."""
    path = Path(pattern)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_corpus(file, path))
    else:
        names = glob.glob(os.fspath(pattern), recursive=True)
        found = sorted(Path(name) for name in names if Path(name).is_file())
    if not found:
        others = sorted(file.name for file in path.rglob("*") if file.is_file())
        fix = "correct the path (relative paths start from the current folder)"
        raise DataError(
            "no corpus files here" if path.is_dir() else "no such file, folder or glob",
            where=pattern,
            found=listing(others) or None,
            expected=f"files ending in {', '.join(SUFFIXES)}",
            fix=f"rename text to NAME.txt; what is read: {PAGE}" if others else fix,
        )
    for file in found:
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(
                "is not a kind of file that can be read",
                where=file,
                found=file.suffix or "no suffix",
                expected=", ".join(SUFFIXES),
                fix=f"rename it to NAME.txt if it is text, else convert it; what is read: {PAGE}",
            )
    return found


def read_file(
    path: str | os.PathLike[str], source: str = "", block_characters: int = MAX_TEXT_CHARACTERS
) -> Iterator[Document]:
    """The documents of one file, streamed; a .txt file is one text, in blocks of this size."""
    path = Path(path)
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path, source)
        elif name.endswith(".jsonl.gz"):
            with gzip.open(path, "rb") as packed:
                yield from _read_jsonl(cast(IO[bytes], packed), path, source)
        elif name.endswith(".jsonl"):
            with path.open("rb") as file:
                yield from _read_jsonl(file, path, source)
        else:
            yield from _read_txt(path, source, block_characters)
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise DataError(
            f"is not a whole gzip file: {problem}", where=path, fix="fetch or compress it again"
        ) from None
    except UnicodeDecodeError as problem:
        raise DataError(
            f"is not UTF-8: {problem}", where=path, fix="convert the file to UTF-8"
        ) from None
    except OSError as problem:
        raise DataError(
            f"cannot be read: {problem.strerror or problem}",
            where=path,
            fix="check that the file exists and may be read",
        ) from None


def write_documents(path: str | os.PathLike[str], documents: Iterable[Document]) -> tuple[int, int]:
    """Writes a jsonl or jsonl.gz file (by its name), atomically; returns (documents, bytes of
    text).

    The same documents give the same bytes: the gzip header holds neither time nor name.
    """
    path = Path(path)
    count = text_bytes = 0
    with atomic_write(path, "wb") as raw:
        is_gzip = path.name.endswith(".gz")
        packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if is_gzip else None
        file = raw if packed is None else packed
        for document in documents:
            file.write(json.dumps(document.as_record(), ensure_ascii=False).encode() + b"\n")
            count += 1
            text_bytes += num_text_bytes(document)
        if packed is not None:
            packed.close()
    return count, text_bytes


def num_text_bytes(document: Document) -> int:
    """UTF-8 bytes of a text, or of the assistant's words in a conversation (those that are
    predicted).
    """
    if document.text is not None:
        return len(document.text.encode())
    return sum(
        len(str(message.get("content") or "").encode())
        for message in document.messages or []
        if message["role"] == "assistant"
    )


def is_empty(document: Document) -> bool:
    """Whether there is nothing to learn: no text, or no words and no calls of an assistant."""
    if document.text is not None:
        return not document.text.strip()
    parts = ("content", "tool_calls")  # which a template writes
    return not any(
        message["role"] == "assistant" and any(message.get(part) for part in parts)
        for message in document.messages or []
    )


def _is_corpus(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and file.name.lower().endswith(SUFFIXES)


def _read_jsonl(file: IO[bytes], path: Path, source: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(file), start=1):
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                "is too long a line",
                where=where,
                found=f"more than {MAX_LINE_BYTES >> 20} MiB",
                expected="one JSON object of one document a line",
                fix="split the document, or write it as a .txt file",
            )
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise DataError("is not UTF-8", where=where, fix="convert the file to UTF-8") from None
        except NOT_JSON as problem:
            raise DataError(
                f"is not valid JSON: {problem}",
                where=where,
                found=repr(line[:60].decode(errors="replace")),
                expected="one JSON object a line",
                fix="correct or remove the line",
            ) from None
        yield from _bounded(document_from_record(record, source, where), where)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line


def _read_txt(path: Path, source: str, block_characters: int) -> Iterator[Document]:
    # A byte order mark says how the file is written, and is no part of the text.
    with path.open(encoding="utf-8-sig") as file:
        chunks = iter(lambda: file.read(READ_CHARACTERS), "")
        yield from _in_blocks(chunks, source, block_characters)


def _bounded(document: Document, where: object) -> Iterator[Document]:
    """The document, in blocks if its text is long."""
    if document.text is not None:
        yield from _in_blocks([document.text], document.source, MAX_TEXT_CHARACTERS)
        return
    size = sum(len(message.get("content") or "") for message in document.messages or [])
    if size > MAX_CONVERSATION_CHARACTERS:
        raise DataError(
            "is too long a conversation",
            where=where,
            found=f"{size:,} characters",
            expected=f"at most {MAX_CONVERSATION_CHARACTERS:,}",
            fix="split the conversation, or remove it",
        )
    yield document


def _in_blocks(chunks: Iterable[str], source: str, size: int) -> Iterator[Document]:
    for number, block in enumerate(cut_blocks(chunks, size)):
        yield Document(text=block, source=source, is_continued=number > 0)


def cut_blocks(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Text in blocks of `size` to twice that many characters; the last one may be shorter.

    They end behind a blank line; where none is in reach, behind a line, then a space.
    An empty text is one empty block if it comes as a chunk.
    """
    rest, has_any = "", None
    for chunk in chunks:
        rest, has_any = rest + chunk, has_any or False
        while len(rest) >= 2 * size:
            end = _block_end(rest, size)
            yield rest[:end]
            rest, has_any = rest[end:], True
    while len(rest) > size and (end := _block_end(rest, size)) < len(rest):
        yield rest[:end]
        rest, has_any = rest[end:], True
    if rest or has_any is False:
        yield rest


def _block_end(text: str, size: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, size - len(mark), 2 * size)
        if found >= 0:
            return found + len(mark)
    return min(2 * size, len(text))


def _read_parquet(path: Path, source: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "parquet needs the package pyarrow", where=path, fix="pip install 'rorqual[train]'"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [c for c in ("text", "messages", "tools") if c in file.schema_arrow.names]
            if "text" not in columns and "messages" not in columns:
                raise DataError(
                    "has no column of text",
                    where=path,
                    found=f"columns {listing(file.schema_arrow.names)}",
                    expected='a column "text" or "messages"',
                    fix="rename the column",
                )
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for place in range(batch.num_rows):  # a row at a time becomes Python's
                    (row,) = batch.slice(place, 1).to_pylist()
                    number += 1
                    where = f"{path}: row {number}"
                    yield from _bounded(document_from_record(row, source, where), where)
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(
            f"is not a readable parquet file: {problem}", where=path, fix="write or fetch it again"
        ) from None
