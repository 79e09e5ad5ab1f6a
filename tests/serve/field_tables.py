"""The tables of docs/api.md that the table of fields makes; `python tests/serve/field_tables.py`
writes them there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from rorqual.serve.fields import CHAT, COMPLETIONS, ROUTES, ROWS, FieldRow

API = Path(__file__).parents[2] / "docs" / "api.md"
WHERE = {(CHAT,): "chat", (COMPLETIONS,): "completions", ROUTES: "both routes"}
MARKS = ("<!-- fields: begin -->\n", "<!-- fields: end -->\n")


def tables() -> str:
    """Markdown of all rows that are not honoured."""
    return (
        "| accepted, without effect | in | documented by |\n|---|---|---|\n"
        + "".join(_names("ignored"))
        + "\n| accepted, without effect, named in the reply | in | documented by |\n|---|---|---|\n"
        + "".join(_names("noted"))
        + "\n| refused, except with | | in | documented by |\n|---|---|---|---|\n"
        + "".join(map(_refused, _merged("refused")))
    )


def written() -> str:
    """What docs/api.md has."""
    return API.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]


def _merged(fate: str) -> list[tuple[FieldRow, str]]:
    """One row of each name in a route or in both, and where."""
    places: dict[tuple[str, str, bool], list[str]] = {}
    first: dict[tuple[str, str, bool], FieldRow] = {}
    for row in ROWS:
        if row.fate == fate:
            key = (row.name, row.servers, row.place in ROUTES)
            first.setdefault(key, row)
            places.setdefault(key, []).append(row.place)
    found = []
    for key, row in first.items():
        where = WHERE.get(tuple(places[key])) or ", ".join(f"`{p}`" for p in places[key])
        found.append((row, where))
    return found


def _names(fate: str) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for row, where in _merged(fate):
        groups.setdefault((row.servers, where), []).append(f"`{row.name}`")
    return [
        f"| {', '.join(names)} | {where} | {servers} |\n"
        for (servers, where), names in groups.items()
    ]


def _refused(item: tuple[FieldRow, str]) -> str:
    row, where = item
    off = ", ".join(f"`{json.dumps(value)}`" for value in (None, *row.off))
    return f"| `{row.name}`: {off} | {row.note} | {where} | {row.servers} |\n"


def main() -> None:
    text = API.read_text(encoding="utf-8")
    whole = re.compile(re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1]), re.DOTALL)
    API.write_text(whole.sub(lambda _: MARKS[0] + tables() + MARKS[1], text), encoding="utf-8")


if __name__ == "__main__":
    main()
