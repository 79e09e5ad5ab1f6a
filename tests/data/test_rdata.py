"""R's files, kind by kind. Oracle: bytes written by hand after "R Internals", §1.8 (XDR)."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from rorqual.data.extractors.rdata import load_lazy_database, load_rds
from rorqual.errors import DataError

NIL = struct.pack(">i", 254)
NA = struct.pack(">ii", 9, -1)


def integers(*values: int, kind: int = 13, flags: int = 0) -> bytes:
    return struct.pack(f">ii{len(values)}i", kind | flags, len(values), *values)


def reals(*values: float) -> bytes:
    return struct.pack(f">ii{len(values)}d", 14, len(values), *values)


def characters(raw: bytes, level: int = 8) -> bytes:
    return struct.pack(">ii", 9 | level << 12, len(raw)) + raw


def strings(*items: bytes) -> bytes:
    return struct.pack(">ii", 16, len(items)) + b"".join(items)


def symbol(name: str) -> bytes:
    return struct.pack(">i", 1) + characters(name.encode())


def reference(number: int, *, is_packed: bool) -> bytes:
    """To the symbol of that number, from 1 on: in the flags, or behind them."""
    return struct.pack(">i", 255 | number << 8) if is_packed else struct.pack(">ii", 255, number)


def values(*items: bytes, attributes: bytes = b"") -> bytes:
    flags = 19 | (0x200 if attributes else 0)
    return struct.pack(">ii", flags, len(items)) + b"".join(items) + attributes


def tagged(tag: bytes, value: bytes) -> bytes:
    return struct.pack(">i", 2 | 0x400) + tag + value


def bare(value: bytes, attributes: bytes = b"") -> bytes:
    return struct.pack(">i", 2 | (0x200 if attributes else 0)) + attributes + value


def file_of(body: bytes) -> bytes:
    return b"X\n" + struct.pack(">iii", 2, 0x040201, 0x020300) + body


def read(folder: Path, body: bytes) -> Any:
    (folder / "d.rds").write_bytes(file_of(body))
    return load_rds(folder / "d.rds")


NAMES = tagged(symbol("names"), strings(characters(b"a"), characters(b"b"))) + NIL
ALTREP = struct.pack(">i", 238)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (NIL, None),
        (struct.pack(">i", 253), None),
        (integers(1, -2), [1, -2]),
        (integers(0, 1, kind=10), [0, 1]),
        (reals(0.5, -3.0), [0.5, -3.0]),
        (strings(characters(b"x"), NA, characters(b"")), ["x", None, ""]),
        (strings(characters(b"caf\xe9", level=4), characters(b"\xc3\xa9")), ["café", "é"]),
        (values(integers(1), reals(2.0)), [[1], [2.0]]),
        (values(integers(1), integers(2), attributes=NAMES), {"a": [1], "b": [2]}),
        # Other attributes are read over, and the names of a vector are not kept.
        (integers(7, 8, flags=0x200) + NAMES, [7, 8]),
        (values(integers(1), attributes=tagged(symbol("class"), integers(3)) + NIL), [[1]]),
        (tagged(symbol("p"), integers(1)) + tagged(symbol("q"), NIL) + NIL, {"p": [1], "q": None}),
        (bare(integers(1)) + bare(integers(2)) + NIL, [[1], [2]]),
        (bare(integers(1), attributes=integers(5)) + NIL, [[1]]),
        (tagged(symbol("p"), integers(1)) + bare(integers(2)) + NIL, [[1], [2]]),
        (ALTREP + bare(symbol("compact_intseq")) + NIL + reals(4, 3, 2) + NIL, [3, 5, 7, 9]),
        (
            values(
                ALTREP
                + tagged(symbol("class"), symbol("compact_intseq"))
                + NIL
                + reals(2, 1, 1)
                + NAMES,
                integers(5),
            ),
            [[1, 2], [5]],
        ),
        (ALTREP + bare(symbol("wrap_real")) + NIL + values(reals(6), integers(0)) + NIL, [6.0]),
    ],
)
def test_each_kind_of_object(tmp_path: Path, body: bytes, value: Any) -> None:
    assert read(tmp_path, body) == value


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_symbol_is_written_once_and_named_by_its_number(tmp_path: Path, is_packed: bool) -> None:
    """Environments of packages are numbered among them."""
    package = struct.pack(">iii", 247, 0, 1) + characters(b"base")
    rest = [
        tagged(symbol("p"), package),
        tagged(symbol("q"), integers(2)),
        tagged(reference(3, is_packed=is_packed), integers(3)),
        tagged(reference(1, is_packed=is_packed), integers(4)),
    ]
    assert read(tmp_path, b"".join(rest) + NIL) == {"p": [4], "q": [3]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (struct.pack(">ii", 15, 0), "kind of R object"),  # complex numbers
        (ALTREP + bare(symbol("deferred_string")) + NIL + NIL + NIL, "compact R vector"),
        (integers(1, 2)[:-1], "ends too early"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, body: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, body)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zlib.compress])
def test_a_packed_file_that_was_cut_is_named(tmp_path: Path, pack: Any) -> None:
    whole = file_of(integers(*range(1000)))
    (tmp_path / "d.rds").write_bytes(pack(whole))
    assert load_rds(tmp_path / "d.rds") == list(range(1000))
    (tmp_path / "d.rds").write_bytes(pack(whole)[:-20])
    with pytest.raises(DataError, match="cannot be decompressed"):
        load_rds(tmp_path / "d.rds")


def database(folder: Path, block: bytes, length: int) -> Any:
    head = struct.pack(">I", length)
    (folder / "d.rdb").write_bytes(b"before" + head + block + b"after")
    place = values(integers(6, 4 + len(block)), attributes=tagged(
        symbol("names"), strings(characters(b"it"))
    ) + NIL)  # fmt: skip
    variables = tagged(symbol("names"), strings(characters(b"variables"))) + NIL
    (folder / "d.rdx").write_bytes(zlib.compress(file_of(values(place, attributes=variables))))
    return load_lazy_database(folder / "d")


FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
PLAIN = file_of(integers(*range(100)))
BLOCKS = {
    "plain": b"0" + PLAIN,
    "zlib": zlib.compress(PLAIN),
    "bzip2": b"2" + bz2.compress(PLAIN),
    "xz": b"Z" + lzma.compress(PLAIN, format=lzma.FORMAT_RAW, filters=FILTERS),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_a_database(tmp_path: Path, kind: str) -> None:
    block = BLOCKS[kind]
    assert database(tmp_path, block, len(PLAIN)) == {"it": list(range(100))}
    for wrong in (len(PLAIN) - 1, len(PLAIN) + 1):
        with pytest.raises(DataError, match="another length"):
            database(tmp_path, block, wrong)
    with pytest.raises(DataError, match=r"decompressed|another length"):
        database(tmp_path, block[:-9], len(PLAIN))
