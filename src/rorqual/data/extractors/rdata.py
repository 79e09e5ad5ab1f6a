"""Character data out of R's files without R: serialised objects (rds) and lazy-load databases
(rdb + rdx).

Only what a package of text needs is read: lists, vectors, strings, symbols, attributes (format: "R
Internals", §1.8 Serialization Formats, XDR, versions 2 and 3). Anything else is a DataError rather
than a guess.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

from rorqual.errors import DataError

NIL, GLOBAL_ENV, BASE_ENV, EMPTY_ENV, MISSING, UNBOUND = 254, 253, 241, 242, 251, 252
REFERENCE, PERSISTENT, ALTERNATIVE = 255, 247, 238
SYMBOL, PAIRLIST, CHARACTERS, LOGICALS, INTEGERS, REALS, STRINGS, LIST = 1, 2, 9, 10, 13, 14, 16, 19
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10
IS_LATIN1 = 1 << 2  # in the level bits of a character string


def load_rds(path: str | Path) -> Any:
    """The one object of an .rds file."""
    return _Reader(_inflate(Path(path).read_bytes(), path), path).read()


def load_lazy_database(stem: str | Path) -> dict[str, Any]:
    """The objects of the database `stem`.rdb, found through `stem`.rdx (how installed packages keep
    their data).
    """
    stem = Path(stem)
    index = load_rds(stem.with_suffix(".rdx"))
    raw = stem.with_suffix(".rdb").read_bytes()
    objects = {}
    for name, (offset, length) in index["variables"].items():
        block = _inflate_block(raw[offset : offset + length], stem.with_suffix(".rdb"))
        objects[name] = _Reader(block, stem.with_suffix(".rdb")).read()
    return objects


def _inflate(raw: bytes, where: object) -> bytes:
    try:
        if raw[:2] == b"\x1f\x8b":
            return gzip.decompress(raw)
        if raw[:3] == b"BZh":
            return bz2.decompress(raw)
        if raw[:6] == b"\xfd7zXZ\x00":
            return lzma.decompress(raw)
        if raw[:2] in (b"\x78\x9c", b"\x78\xda", b"\x78\x01"):
            return zlib.decompress(raw)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as problem:
        raise DataError(
            f"cannot be decompressed: {problem}", where=where, fix="fetch the file again"
        ) from None
    return raw


def _inflate_block(raw: bytes, where: object) -> bytes:
    """A database block: four bytes of length, one of kind for bzip2 and xz, the packed bytes."""
    length, kind, body = struct.unpack(">I", raw[:4])[0], raw[4:5], raw[5:]
    try:
        if kind == b"2":
            block = bz2.decompress(body)
        elif kind == b"Z":
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
            block = lzma.decompress(body, format=lzma.FORMAT_RAW, filters=filters)
        elif kind == b"0":
            block = body
        else:
            block = zlib.decompress(raw[4:])
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as problem:
        raise DataError(
            f"a block cannot be decompressed: {problem}", where=where, fix="fetch the file again"
        ) from None
    if len(block) != length:
        raise DataError(
            "a block has another length than it says",
            where=where,
            found=len(block),
            expected=length,
            fix="fetch the file again",
        )
    return block


class _Reader:
    """A cursor over one serialised object in XDR (big-endian) form."""

    def __init__(self, raw: bytes, where: object) -> None:
        self.raw, self.where, self.place = raw, where, 0
        self.references: list[Any] = []

    def read(self) -> Any:
        if self._take(2) != b"X\n":
            raise DataError(
                "is not an XDR serialisation",
                where=self.where,
                found=repr(self.raw[:2]),
                expected="X",
                fix="save it in R's default binary form",
            )
        version = self._integer()
        self._take(8)
        if version == 3:
            self._take(self._integer())
        elif version != 2:
            raise DataError(
                "is of an unknown serialisation version",
                where=self.where,
                found=version,
                expected="2 or 3",
                fix="save it with version = 2",
            )
        return self._item()

    def _take(self, count: int) -> bytes:
        piece = self.raw[self.place : self.place + count]
        if len(piece) != count:
            raise DataError("ends too early", where=self.where, fix="fetch the file again")
        self.place += count
        return piece

    def _integer(self) -> int:
        return int(struct.unpack(">i", self._take(4))[0])

    def _numbers(self, code: str, width: int) -> list[Any]:
        count = self._integer()
        return list(struct.unpack(f">{count}{code}", self._take(count * width)))

    def _item(self) -> Any:
        flags = self._integer()
        kind = flags & 0xFF
        if kind in (NIL, GLOBAL_ENV, BASE_ENV, EMPTY_ENV, MISSING, UNBOUND):
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8 or self._integer()) - 1]
        if kind == SYMBOL:
            name = self._item()
            self.references.append(name)
            return name
        if kind == PERSISTENT:
            self._integer()
            name = [self._item() for _ in range(self._integer())]
            self.references.append(name)
            return name
        if kind == CHARACTERS:
            length = self._integer()
            encoding = "latin-1" if (flags >> 12) & IS_LATIN1 else "utf-8"
            return None if length == -1 else self._take(length).decode(encoding)
        if kind == PAIRLIST:
            return self._pairs(flags)
        if kind == ALTERNATIVE:
            return self._alternative()
        return self._vector(kind, flags)

    def _vector(self, kind: int, flags: int) -> Any:
        value: list[Any]
        if kind in (LOGICALS, INTEGERS):
            value = self._numbers("i", 4)
        elif kind == REALS:
            value = self._numbers("d", 8)
        elif kind in (STRINGS, LIST):
            value = [self._item() for _ in range(self._integer())]
        else:
            raise DataError(
                "holds a kind of R object that is not read here",
                where=self.where,
                found=f"type {kind}",
                expected="vectors, lists and strings",
                fix="save only character data",
            )
        attributes = (self._item() or {}) if flags & HAS_ATTRIBUTES else {}
        names = attributes.get("names")
        return dict(zip(names, value, strict=True)) if kind == LIST and names else value

    def _pairs(self, flags: int) -> Any:
        """A pairlist: a dict by its tags, a list where there are none."""
        pairs = []
        while flags & 0xFF == PAIRLIST:
            if flags & HAS_ATTRIBUTES:
                self._item()
            tag = self._item() if flags & HAS_TAG else None
            pairs.append((tag, self._item()))
            flags = self._integer()
        if all(tag is not None for tag, _ in pairs):
            return dict(pairs)
        return [value for _, value in pairs]

    def _alternative(self) -> Any:
        """An ALTREP vector: its class, its state, its attributes."""
        described = self._item()
        name = described[0] if isinstance(described, list) else next(iter(described.values()))
        state = self._item()
        self._item()
        if name == "compact_intseq":
            count, first, step = state
            return [int(first + step * place) for place in range(int(count))]
        if name.startswith("wrap_"):
            return state[0]
        raise DataError(
            "holds a compact R vector that is not read here",
            where=self.where,
            found=name,
            fix="save it with version = 2",
        )
