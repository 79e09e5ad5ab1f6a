"""docs/training.md: its table has each key of a recipe, and its recipes load.

Oracle: the dataclasses that read a recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from rorqual.cli.stages import stages
from rorqual.train import load_recipe
from rorqual.train.lr_schedule import Amount
from rorqual.train.stages.corpora import CorporaStage

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SIMPLE = {int: "integer", float: "number", bool: "boolean", str: "text"}
ROW = re.compile(r"\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+) \|")


def rows_of_stages() -> dict[str, tuple[str, str]]:
    """Key -> (type, default) of all stages; a key that several have is the same in all of them."""
    of_stage = [rows_of(cls) for cls in stages()]
    found = dict(of_stage[0])
    for rows in of_stage[1:]:
        assert rows.items() - {("stage", rows["stage"])} <= found.items()
    found["stage"] = (" or ".join(rows["stage"][0] for rows in of_stage), found["stage"][1])
    return found


def rows_of(cls: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Key -> (type, default) as the page writes them, of a section and those inside it."""
    found = {}
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint, key = hints[field.name], prefix + field.name
        section = next(_sections(hint), None)
        if section is not None:
            found |= rows_of(section, f"{key}.")
        else:
            found[key] = (_type(hint), _default(cls.__pydantic_fields__[field.name]))
    return found


def _sections(hint: Any) -> Iterator[Any]:
    """The settings class in a hint: itself, one or none, or entries of a list."""
    yield from (kind for kind in (hint, *get_args(hint)) if is_dataclass(kind))


def _type(hint: Any) -> str:
    if hint == Amount:
        return "amount"
    if get_origin(hint) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(hint))
    if get_origin(hint) is dict:
        return "section"
    (kind,) = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return SIMPLE[kind]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == {}:
        return "none"
    if isinstance(value, float):
        return f"`{float(f'{value:.4g}')}`"
    return f"`{value:_}`" if type(value) is int else f"`{json.dumps(value)}`"


def test_the_table_has_every_key_and_no_other() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if "| `" in line]
    found = [match.groups() for line in lines if (match := ROW.fullmatch(line))]
    assert len(found) == len(lines), "a row of another form"
    assert {key: (kind, default) for key, kind, default, _ in found} == rows_of_stages()
    assert [key for key, *_ in found] == list(rows_of_stages()), "in the order of the recipe"


def examples() -> list[str]:
    return re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_its_recipes_load(number: int, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(examples()[number], encoding="utf-8")
    recipe = load_recipe(file, stages())
    assert isinstance(recipe, CorporaStage)
    assert recipe.stage == ("pretrain", "sft")[number]
    assert recipe.data.sources[0].path is not None


def test_the_conversation_of_the_page_is_read() -> None:
    from rorqual.data.corpus import document_from_record
    from rorqual.tokenizer import load_tokenizer

    (line,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    document = document_from_record(json.loads(line), "page", PAGE)
    assert document.messages is not None
    tokenizer = load_tokenizer("tiny")
    ids, mask = tokenizer.encode_training(document.messages)
    learnt = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert tokenizer.decode(learnt[:-1]) == "Hello."
    assert learnt[-1] == tokenizer.eos_id
