"""The tables of docs/api.md that the table of fields makes; `python tests/serve/field_tables.py`
writes them there.
"""

from __future__ import annotations

import json
from pathlib import Path

from rorqual.serve.field_row import CHAT, COMPLETIONS, ROUTES, FieldRow
from rorqual.serve.fields import ROWS

API = Path(__file__).parents[2] / "docs" / "api.md"
WHERE = {(CHAT,): "chat", (COMPLETIONS,): "completions", ROUTES: "both routes"}
MARK = "<!-- {} fields: {} -->\n"


def tables() -> dict[str, str]:
    """Markdown of each part of the table, by its name there."""
    return {
        "common": _honoured(ROUTES),
        "chat": _honoured((CHAT,)),
        "completion": _honoured((COMPLETIONS,)),
        "other": _others(),
    }


def _honoured(places: tuple[str, ...]) -> str:
    rows = [row for row, where in _merged("honoured") if where == WHERE[places]]
    head = "| field | values | | documented by |\n|---|---|---|---|\n"
    return head + "".join(
        f"| `{row.name}` | {row.values} | {row.note} | {row.servers} |\n" for row in rows
    )


def _others() -> str:
    return (
        "| accepted, without effect | in | documented by |\n|---|---|---|\n"
        + "".join(_names("ignored"))
        + "\n| accepted, without effect, named in the reply | in | documented by |\n|---|---|---|\n"
        + "".join(_names("noted"))
        + "\n| refused, except with | | in | documented by |\n|---|---|---|---|\n"
        + "".join(map(_refused, _merged("refused")))
    )


def written() -> dict[str, str]:
    """What docs/api.md has."""
    text = API.read_text(encoding="utf-8")
    return {
        name: text.split(MARK.format(name, "begin"))[1].split(MARK.format(name, "end"))[0]
        for name in tables()
    }


def _merged(fate: str) -> list[tuple[FieldRow, str]]:
    """One row of what is said of a name in a route or in both alike, and where."""
    groups: dict[tuple[object, ...], list[FieldRow]] = {}
    for row in ROWS:
        if row.fate == fate:
            is_route = row.place in ROUTES
            key = (row.name, row.servers, is_route, row.values, row.note, str(row.off))
            groups.setdefault(key, []).append(row)
    found = []
    for rows in groups.values():
        places = [row.place for row in rows]
        where = WHERE.get(tuple(places)) or ", ".join(f"`{place}`" for place in places)
        found.append((rows[0], where))
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
    for name, table in tables().items():
        before, _, rest = text.partition(MARK.format(name, "begin"))
        after = rest.partition(MARK.format(name, "end"))[2]
        text = before + MARK.format(name, "begin") + table + MARK.format(name, "end") + after
    API.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
