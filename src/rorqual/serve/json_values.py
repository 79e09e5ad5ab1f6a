"""What a text of JSON may hold, before and after it is parsed: the same on every way in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from rorqual.serve.errors import MAX_SHOWN_CHARACTERS, ApiError

MAX_VALUES = 100_000
"""Commas and colons outside of texts; more where the model's context has room for more ids."""
# A text without an end reaches to the body's end: looked for again at each of its quotes it took
# hours. Possessive, so that nothing is tried twice.
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_SUSPECT = re.compile(rb"NaN|Infinity|[0-9][eE]\+?[0-9]{3}|(?<![0-9])[0-9]{200}|\\u[dD][89a-fA-F]")
"""What may be a number without end or half a surrogate pair: it is looked for before parsing.
199 digits and an exponent of two make less than 1e298, and floats end at 1.8e308.
"""
_HALF = re.compile("[\ud800-\udfff]")


def check_values(content: bytes, most: int) -> None:
    """ApiError 413 for a body of more than `most` values, 400 for one that is not UTF-8."""
    if b"\0" in content:  # no JSON has it; Python would read UTF-16, where values cannot be counted
        text = "the body is not valid JSON: it has a zero byte, as UTF-16 has; send UTF-8"
        raise ApiError(400, text, code="invalid_json")
    if num_marks(content) > most and (num := num_marks(_TEXTS.sub(b"", content))) > most:
        message = f"the body has {num} values; this server parses at most {most}"
        raise ApiError(413, message, code="too_many_values")


def is_suspect(content: bytes) -> bool:
    """Whether it may hold what `check_repeatable` refuses, which takes longer."""
    return _SUSPECT.search(content) is not None


def check_repeatable(body: object) -> None:
    """ApiError 422 for numbers and texts that are none in JSON, though Python reads them so."""
    if (found := unrepeatable(body)) is not None:
        where, fault = found
        message = f"{where[:MAX_SHOWN_CHARACTERS]}: {fault}"
        raise ApiError(422, message, code="invalid_value", param=where)


def unrepeatable(body: object) -> tuple[str, str] | None:
    """The place of such a number or text, and what is wrong with it."""
    levels: list[tuple[str, object]] = [("", body)]
    while levels:
        place, value = levels.pop()
        inner: Iterable[tuple[str | int, object]]
        inner = value.items() if isinstance(value, dict) else enumerate(_items(value))
        for key, item in inner:
            if fault := _fault_of(item) or _fault_of(key):
                return _inside(place, key), fault
            if isinstance(item, dict | list):
                levels.append((_inside(place, key), item))
    return None


def _items(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else [value]


def _inside(place: str, key: str | int) -> str:
    return f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".removeprefix(".")


def _fault_of(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "is no finite number"
    if isinstance(value, str) and _HALF.search(value):
        return "holds half of a surrogate pair, which is no text"
    return None


def num_marks(content: bytes) -> int:
    return content.count(b",") + content.count(b":")
