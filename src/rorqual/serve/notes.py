"""What a reply says beside its answer: the fields that had no effect, in headers and in the log.

Nothing that a client wrote gets into a header but names that look like `top_k`: letters, digits and
underscores, at most 20 of them and 1 kB in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

IGNORED_HEADER, NOTES_HEADER = "x-rorqual-ignored-fields", "x-rorqual-notes"
MAX_NAMES = 20
MAX_TOLD = 1000
MAX_HEADER_BYTES = 1000
MORE = "..."
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}(\.[A-Za-z_$][A-Za-z0-9_-]{0,63})*")


@dataclass(frozen=True)
class ExtraField:
    """A field of a request that its schema does not declare."""

    owner: BaseModel
    place: str
    """`messages[2].weight`"""
    name: str
    value: Any


@dataclass
class Notes:
    """`unknown` are the fields that nobody documents; `texts` are sentences of ours, ASCII."""

    unknown: list[ExtraField] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    _ignored: dict[str, None] = field(default_factory=dict)

    def ignore(self, place: str) -> None:
        """Notes that the field at `place` had no effect; a list's items count as one.

        A thousand of them are told from each other: the others are among "...".
        """
        if len(self._ignored) >= MAX_TOLD:
            return
        self._ignored[re.sub(r"\[\d+\]", "", place)] = None

    def say(self, text: str) -> None:
        """Adds a sentence, once."""
        if text not in self.texts:
            self.texts.append(text)

    @property
    def ignored(self) -> list[str]:
        """Names that any header and any log may show."""
        shown: list[str] = []
        num_left = MAX_HEADER_BYTES - len(MORE)
        for name in self._ignored:
            num_bytes = len(name) + len(", ")
            if num_bytes <= num_left and len(shown) < MAX_NAMES and _NAME.fullmatch(name):
                shown.append(name)
                num_left -= num_bytes
        return shown

    def headers(self) -> dict[str, str]:
        headers = {}
        if self._ignored:
            is_all = len(self.ignored) == len(self._ignored)
            headers[IGNORED_HEADER] = ", ".join([*self.ignored, *([] if is_all else [MORE])])
        if self.texts:
            headers[NOTES_HEADER] = "; ".join(self.texts)
        return headers


def extra_fields(model: BaseModel, place: str = "") -> Iterator[ExtraField]:
    """The undeclared fields of a request's object and of those in it."""
    for name, value in (model.model_extra or {}).items():
        yield ExtraField(model, f"{place}{name}", name, value)
    for name, value in model.__dict__.items():
        if isinstance(value, BaseModel):
            yield from extra_fields(value, f"{place}{name}.")
        elif isinstance(value, Sequence) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from extra_fields(item, f"{place}{name}[{index}].")
