"""The tables of docs/api.md that the table of fields makes; `python tests/serve/field_tables.py`
writes them there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from rorqual.serve.field_row import (
    CHAT,
    CLAUDE,
    CLAUDE_BLOCKS,
    CLAUDE_OUTPUT,
    CLAUDE_TOOLS,
    COMPLETIONS,
    COUNT_TOKENS,
    INPUT_TOKENS,
    RESPONSE_ITEMS,
    RESPONSE_PARTS,
    RESPONSE_REASONING,
    RESPONSE_TEXT,
    RESPONSE_TOOLS,
    RESPONSES,
    ROUTES,
    FieldRow,
)
from rorqual.serve.fields import ROWS

API = Path(__file__).parents[2] / "docs" / "api.md"
WHERE = {
    (CHAT,): "chat",
    (COMPLETIONS,): "completions",
    ROUTES: "both routes",
    (RESPONSES,): "`/v1/responses`",
    (INPUT_TOKENS,): "`/input_tokens`",
    (RESPONSES, INPUT_TOKENS): "both",
    (CLAUDE,): "`/v1/messages`",
    (COUNT_TOKENS,): "`/count_tokens`",
    (CLAUDE, COUNT_TOKENS): "both",
}
RESPONSE_PLACES = (
    RESPONSES,
    INPUT_TOKENS,
    RESPONSE_ITEMS,
    RESPONSE_PARTS,
    RESPONSE_TOOLS,
    RESPONSE_TEXT,
    RESPONSE_REASONING,
)
CLAUDE_PLACES = (CLAUDE, COUNT_TOKENS, CLAUDE_BLOCKS, CLAUDE_TOOLS, CLAUDE_OUTPUT)
APIS = {"responses": (RESPONSES, RESPONSE_PLACES), "messages": (CLAUDE, CLAUDE_PLACES)}
MARK = "<!-- {} fields: {} -->\n"


def tables() -> dict[str, str]:
    """Markdown of each part of the table, by its name there."""
    others = {row.place for row in ROWS} - {*RESPONSE_PLACES, *CLAUDE_PLACES}
    found = {
        "common": _honoured(ROUTES),
        "chat": _honoured((CHAT,)),
        "completion": _honoured((COMPLETIONS,)),
        "other": _others(others),
    }
    for name, (route, places) in APIS.items():
        rows = [row for row in ROWS if row.fate == "honoured" and row.place == route]
        found |= {name: _table(rows), f"other {name}": _others(places)}
    return found


def _honoured(places: tuple[str, ...]) -> str:
    return _table([row for row, where in _merged("honoured", ROUTES) if where == WHERE[places]])


def _table(rows: Sequence[FieldRow]) -> str:
    head = "| field | values | | documented by |\n|---|---|---|---|\n"
    return head + "".join(
        f"| `{row.name}` | {row.values} | {row.note} | {row.servers} |\n" for row in rows
    )


def _others(places: Collection[str]) -> str:
    ways = {fate: _merged(fate, places) for fate in ("ignored", "noted", "refused")}
    return (
        "| accepted, without effect | in | documented by |\n|---|---|---|\n"
        + "".join(_names(ways["ignored"]))
        + "\n| accepted, without effect, named in the reply | in | documented by |\n|---|---|---|\n"
        + "".join(_names(ways["noted"]))
        + "\n| refused, except with | | in | documented by |\n|---|---|---|---|\n"
        + "".join(map(_refused, ways["refused"]))
    )


def written() -> dict[str, str]:
    """What docs/api.md has."""
    text = API.read_text(encoding="utf-8")
    return {
        name: text.split(MARK.format(name, "begin"))[1].split(MARK.format(name, "end"))[0]
        for name in tables()
    }


def _merged(fate: str, within: Collection[str]) -> list[tuple[FieldRow, str]]:
    """One row of what is said of a name in several places alike, and where."""
    groups: dict[tuple[object, ...], list[FieldRow]] = {}
    for row in ROWS:
        if row.fate == fate and row.place in within:
            is_route = (row.place,) in WHERE
            key = (row.name, row.servers, is_route, row.values, row.note, str(row.off))
            groups.setdefault(key, []).append(row)
    found = []
    for rows in groups.values():
        places = tuple(row.place for row in rows)
        named = [f"`{place.rpartition(': ')[2]}`" for place in places]
        found.append((rows[0], WHERE.get(places) or ", ".join(named)))
    return found


def _names(rows: Sequence[tuple[FieldRow, str]]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for row, where in rows:
        off = f" (not {', '.join(f'`{json.dumps(value)}`' for value in row.off)})"
        name = f"`{row.name}`" + (off if row.off else "")
        groups.setdefault((row.servers, where), []).append(name)
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
