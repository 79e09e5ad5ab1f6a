"""docs/recipes.md: every key of a recipe, made from the settings that read it.

Type, range and default are those of the fields, the meaning is what stands below each field, and
what a resume allows is `changes.freedom`'s. `rorqual train --keys` prints the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rorqual.config import descriptions
from rorqual.model import PRESETS, ModelConfig
from rorqual.train.changes import freedom
from rorqual.train.lr_schedule import Amount
from rorqual.train.recipe import Recipe, Stages

SIMPLE = {int: "integer", float: "number", bool: "boolean", str: "text"}
SHOWN_PRESETS = ("tiny", "671b")
# What the settings of a model cannot say, since its keys are those of a preset.
PRESET_ROW = (
    "Which shape to begin from; required without `init_from`, and not allowed with it.",
    f"one of {', '.join(f'`{json.dumps(name)}`' for name in PRESETS)}",
)
HEAD = """\
# Every key of a recipe

This page is what `rorqual train --keys` prints, made from the settings themselves. A recipe is a
TOML file: keys at the head, then sections. [own-data.md](own-data.md) and
[fine-tuning.md](fine-tuning.md) have whole recipes to start from; required are only `name`, where
the model and the text come from, and `[training]` and `[batch_ramp]`. `--set section.key=value`
changes one value for one command.

* A key that is unknown, of another stage, or that would do nothing in this stage or model, is an
  error that names it. What does nothing for the text at hand (a rate of texts where all are
  conversations, the size of a tokenizer that is there already) is told before the first step.
* Types are strict: `"100"` and `2.0` are no integers. An **amount** is a point of time in the
  run: a fraction from 0.0 to 1.0 is a share of `total_tokens`, a whole number is tokens. So `1.0`
  is the end of the run and `1` is one token; `0.5` is half way, `500_000` is that many tokens.
* Default *required* means that the key must be there, *none* that nothing is set where it is left
  out. The numbers are the report's (§4.2), its durations as shares of 14.8T tokens.
* **Resume** says what the same run may be continued with ([runs.md](runs.md)): *free*, the key
  may differ; *asked*, only with `--allow-changes`; *fixed*, never.
"""


@dataclass(frozen=True)
class Row:
    """One key: its dotted name and what the page says of it."""

    key: str
    kind: str
    default: str
    resume: str
    meaning: str

    def line(self) -> str:
        name = self.key.rpartition(".")[2]
        return f"| `{name}` | {self.kind} | {self.default} | {self.resume} | {self.meaning} |"


@dataclass(frozen=True)
class Section:
    """A heading with its keys; "" is the head of the file."""

    name: str
    meaning: str
    rows: list[Row]


def page(stages: Stages) -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for section in sections(stages):
        title = section.name and f"[{section.name}]"
        if section.name == "data.sources":
            title = f"[{title}]"
        parts.append(f"## {title or 'At the head of the file'}\n")
        if section.meaning:
            parts.append(f"{section.meaning}\n")
        parts.append(_table(section))
    return "\n".join(parts)


def sections(stages: Stages) -> list[Section]:
    """All sections of all stages in a recipe's order; a key that several have is named once."""
    found: dict[str, Section] = {}
    for cls in stages:
        for section in _sections_of(cls, "", "", cls):
            known = found.setdefault(section.name, section)
            names = {row.key for row in known.rows}
            known.rows.extend(row for row in section.rows if row.key not in names)
    head = found[""].rows
    kinds = " or ".join(f"`{json.dumps(cls.stage)}`" for cls in stages)
    place = next(number for number, row in enumerate(head) if row.key == "stage")
    old = head[place]
    head[place] = Row(old.key, kinds, f"`{json.dumps(stages[0].stage)}`", old.resume, old.meaning)
    return list(found.values())


def _sections_of(cls: Any, name: str, meaning: str, stage: type[Recipe]) -> Iterator[Section]:
    hints, said = get_type_hints(cls), descriptions(cls)
    own = Section(name, meaning, [])
    inner: list[Section] = []
    for field in _ordered(cls):
        key = f"{name}.{field}" if name else field
        text = " ".join(said.get(field, "").split())
        if key == "model":
            inner += _model_sections(text, stage)
        elif (part := _settings_in(hints[field])) is None:
            own.rows.append(_row(cls, key, field, hints[field], text, stage))
        else:
            inner += _sections_of(part, key, text, stage)
    yield own
    yield from inner


def _ordered(cls: Any) -> list[str]:
    """The fields in a recipe's order: what a stage adds of its own stands before [training]."""
    names = [field.name for field in fields(cls)]
    if not issubclass(cls, Recipe):
        return names
    common = [field.name for field in fields(Recipe)]
    place = common.index("training")
    return [*common[:place], *(name for name in names if name not in common), *common[place:]]


def _settings_in(hint: Any) -> Any:
    """The settings class in a hint: itself, one or none, or entries of a list."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _row(cls: Any, key: str, field: str, hint: Any, text: str, stage: type[Recipe]) -> Row:
    default = _default(cls.__pydantic_fields__[field])
    return Row(key, _kind(cls, field, hint), default, freedom(key, stage), text)


def _kind(cls: Any, field: str, hint: Any) -> str:
    """Type and range."""
    bounds = _range(cls.__pydantic_fields__[field].metadata, hint)
    return f"{_type(hint)}, {bounds}" if bounds else _type(hint)


def _model_sections(text: str, stage: type[Recipe]) -> Iterator[Section]:
    """[model]: the fields of a `config.json` that decide what is computed."""
    resume = freedom("model", stage)
    meaning, kind = PRESET_ROW
    rows = [Row("model.preset", kind, "none", resume, meaning)]
    inner: list[Section] = []
    hints, said = get_type_hints(ModelConfig), descriptions(ModelConfig)
    for field in fields(ModelConfig):
        key, hint = f"model.{field.name}", hints[field.name]
        about = " ".join(said.get(field.name, "").split())
        if (part := _settings_in(hint)) is not None:
            kind = "section"
            inner += _sections_of(part, key, about, stage)
        else:
            kind = _kind(ModelConfig, field.name, hint)
        values = [_shown(getattr(PRESETS[name], field.name)) for name in SHOWN_PRESETS]
        rows.append(Row(key, kind, "; ".join(values), resume, about))
    shown = " and ".join(f"`{name}`" for name in SHOWN_PRESETS)
    text = f"{text} The defaults are the preset's; shown are those of {shown}."
    yield Section("model", text, rows)
    yield from inner


def _table(section: Section) -> str:
    default = "; ".join(SHOWN_PRESETS) if section.name == "model" else "default"
    head = f"| key | type | {default} | resume | meaning |\n|---|---|---|---|---|\n"
    return head + "".join(f"{row.line()}\n" for row in section.rows)


def _type(hint: Any) -> str:
    if hint == Amount:
        return "amount"
    if get_origin(hint) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(hint))
    (kind,) = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return SIMPLE[kind]


def _range(metadata: Sequence[Any], hint: Any) -> str:
    """The bounds of a field in words."""
    found = {
        name: getattr(bound, name)
        for bound in metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(bound, name, None) is not None
    }
    is_whole = hint is int or int in get_args(hint)
    if is_whole and "gt" in found:
        found["ge"] = found.pop("gt") + 1
    low = (
        f"{found['ge']:g}"
        if "ge" in found
        else f"more than {found['gt']:g}"
        if "gt" in found
        else ""
    )
    if "lt" in found:
        high = "2^63" if found["lt"] == 2**63 else f"{found['lt']:g}"
        return f"{low} to below {high}"
    if "le" in found:
        return f"{low} to {found['le']:g}"
    return f"at least {low}" if "ge" in found else low


def _default(info: Any) -> str:
    if info.is_required():
        return "required"
    return _shown(info.get_default(call_default_factory=True))


def _shown(value: object) -> str:
    """A value as TOML has it; numbers to four digits."""
    if value is None:
        return "none"
    if is_dataclass(value):
        return "set"
    if isinstance(value, float):
        return f"`{float(f'{value:.4g}')}`"
    return f"`{value:_}`" if type(value) is int else f"`{json.dumps(value)}`"
