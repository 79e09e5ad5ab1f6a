"""docs/recipes.md is what `rorqual train --keys` makes, and what it says holds.

Oracle: recipes that are loaded with the values that the page allows, and with those it does not.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from in_process import run
from rorqual.cli.stages import stages
from rorqual.config import apply_overrides
from rorqual.errors import RorqualError
from rorqual.train.changes import check_changes
from rorqual.train.keys import Row, sections
from rorqual.train.recipe import Recipe, recipe_of

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BASE: dict[str, Any] = {
    "name": "base",
    "model": {
        "preset": "tiny",
        "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 256},
    },
    "tokenizer": {"folder": "tokenizer"},
    "data": {"folder": "tokens", "sources": [{"path": "text.txt"}]},
    "training": {"total_tokens": 4096, "sequence_length": 64, "micro_batch_size": 2},
    "batch_ramp": {"start": 2, "end": 4},
}
ROWS = [row for section in sections(stages()) for row in section.rows]
KEYS = [row.key for row in ROWS]


def test_the_page_is_what_the_command_makes() -> None:
    done = run("train", "--keys")
    assert done.out == PAGE.read_text(encoding="utf-8"), "rorqual train --keys > docs/recipes.md"


def test_every_key_and_every_section_has_a_meaning() -> None:
    assert [row.key for row in ROWS if not row.meaning] == []
    assert [part.name for part in sections(stages()) if part.name and not part.meaning] == []
    assert len(set(KEYS)) == len(KEYS)


def _recipe(key: str, value: object) -> Recipe:
    """The base recipe with one key changed, of the stage that may have it."""
    table = apply_overrides({name: _copy(part) for name, part in BASE.items()}, [])
    *parents, last = key.split(".")
    place: Any = table
    for name in parents:
        place = place.setdefault(name, {})
        place = place[0] if isinstance(place, list) else place
    place[last] = value
    recipe = recipe_of(table, stages())
    recipe.model_config()
    return recipe


def _copy(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _copy(value) for key, value in part.items()}
    return [_copy(value) for value in part] if isinstance(part, list) else part


def _value(text: str) -> Any:
    return tomllib.loads(f"v = {text.strip('`')}")["v"]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.default.startswith("`")], ids=lambda r: r.key
)
def test_a_default_of_the_page_is_what_is_used(row: Row) -> None:
    """To write it down changes nothing; of numbers it has four digits."""
    value = _value(row.default.partition(";")[0])
    written, left_out = _recipe(row.key, value).table(), recipe_of(BASE, stages()).table()
    model, plain = written.pop("model"), left_out.pop("model")
    assert _is_near(written, left_out)
    if row.key.startswith("model."):
        *parents, last = row.key.split(".")[1:]
        assert (model[parents[0]] if parents else model).pop(last) == value
    assert model == plain


def _is_near(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_near(one[key], other[key]) for key in one)
    return bool(one == pytest.approx(other, rel=1e-3) if isinstance(one, float) else one == other)


def outside() -> list[tuple[str, object]]:
    """(key, a value that its row does not allow)."""
    found: list[tuple[str, object]] = []
    for row in ROWS:
        whole = row.kind.startswith("integer")
        if match := re.search(r"at least (\d+)", row.kind):
            low = int(match[1])
            found.append((row.key, low - 1 if whole else low - 0.5))
        elif match := re.search(r"more than (\d+)", row.kind):
            found.append((row.key, float(match[1])))
        elif match := re.search(r", (\d+) to (below )?(2\^63|\d+)", row.kind):
            high = 2**63 if match[3] == "2^63" else int(match[3])
            step = 1 if whole else 0.5
            found.append((row.key, int(match[1]) - step))
            found.append((row.key, high if match[2] else high + step))
        kind = row.kind.partition(",")[0]
        wrong = {"integer": "1", "number": "1", "boolean": 1, "text": 1, "amount": "half"}
        found.append((row.key, wrong.get(kind, "nonsense")))
    return found


@pytest.mark.parametrize(("key", "value"), outside(), ids=lambda part: str(part))
def test_what_the_page_does_not_allow_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(RorqualError) as caught:
        _recipe(key, value)
    assert key.rpartition(".")[2] in str(caught.value)


CHANGED = {  # key -> another value than that of the base recipe or the default
    "name": "other", "seed": 1, "tokenizer.folder": "elsewhere", "data.folder": "elsewhere",
    "data.corpora": "elsewhere", "data.fim_rate": 0.2, "data.sources.epochs": 2.0,
    "training.total_tokens": 8192, "training.sequence_length": 32, "training.threads": 1,
    "training.compile": True, "training.isolate_documents": True, "batch_ramp.end": 8,
    "optimizer.beta2": 0.99, "optimizer.moments": "bfloat16", "lr_schedule.peak": 1e-3,
    "balance.bias_until": 0.5, "mtp.weight": 0.2, "validation.max_tokens": 100,
    "checkpoint.keep_last": 5,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CHANGED.items(), ids=CHANGED)
def test_a_resume_does_what_its_column_says(key: str, value: object, tmp_path: Path) -> None:
    (row,) = [row for row in ROWS if row.key == key]
    stored = recipe_of(BASE, stages()).table()

    def refuses(is_asked: bool) -> bool:
        try:
            check_changes(stored, _recipe(key, value), 2048, where=tmp_path, is_asked=is_asked)
        except RorqualError:
            return True
        return False

    found = (refuses(is_asked=False), refuses(is_asked=True))
    assert (
        found == {"free": (False, False), "asked": (True, False), "fixed": (True, True)}[row.resume]
    )
