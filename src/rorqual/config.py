"""TOML -> frozen dataclass: unknown keys and wrong types are errors that name file, key and mend.

A dataclass lives beside the code that reads it; this file only fills one. `--set a.b=c` overrides
one value, written as in TOML.

No type is turned into another, in a file or in Python: "100", true and 2.0 are no integers, "yes"
is no boolean. An integer is a number wherever one with a fraction may stand; inf and nan are no
numbers. Files that others
write (`is_foreign`) may give a whole number as 2.0 or 1e6, as some programs do.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rorqual.errors import ConfigError, listing
from rorqual.files import explained

T = TypeVar("T")

# What tomllib raises: a number of more than 4,300 digits is a ValueError without a place.
NOT_TOML = (ValueError, RecursionError)
MISSING = ("missing", "missing_argument")
CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# Parts that pydantic adds to the place of a fault: the member of a union that did not fit.
UNION_MEMBERS = frozenset(("int", "float", "bool", "str"))


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes a class a frozen, keyword-only, checked settings dataclass."""
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=CHECKED)(cls))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML file; ConfigError with the line when it cannot be parsed."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            "no such file", where=path, expected="a TOML file", fix="check the path"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            "is a directory; a TOML file is needed",
            where=path,
            fix="name a file, such as one in it",
        ) from None
    except OSError as problem:
        raise explained(problem, ConfigError, path) from None
    except NOT_TOML as problem:
        raise ConfigError(
            f"is not valid TOML: {problem}",
            where=path,
            expected='sections as [training], keys as seed = 1, text in "quotes"',
            fix="correct the line",
        ) from None


def apply_overrides(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=c` strings to a table; c is a TOML value, or else taken as a plain string."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {override!r} has no value",
                expected="--set section.key=value",
                fix="write key and value with = and no spaces between",
            )
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except NOT_TOML:
            value = text
        *parents, last = key.strip().split(".")
        place = table
        for name in parents:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"--set {override!r}: {name} is not a section",
                    found=f"{name} = {_shown(inner)[:80]}",
                    expected="--set section.key=value",
                    fix="correct the key; an entry of [[data.sources]] is changed in the file",
                )
            place = inner
        place[last] = value
    return table


def with_set(path: object, overrides: Sequence[str], keys: Iterable[str] = ("",)) -> str:
    """Where a fault in these keys lies: in a file, or in what was put over it there.

    The key of a section stands for all that is in it, and an empty one for the whole file.
    """
    faulty = tuple(keys)
    places = [override.partition("=")[0].strip() for override in overrides]
    guilty = [
        f"--set {override}"
        for override, place in zip(overrides, places, strict=True)
        if any(not key or _is_within(place, key) or _is_within(key, place) for key in faulty)
    ]
    return " ".join([str(path), *guilty])


def _is_within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def fill(
    cls: type[T],
    table: dict[str, Any],
    where: object = None,
    *,
    overrides: Sequence[str] = (),
    is_foreign: bool = False,
    explain: Callable[[Sequence[Any]], str | None] = lambda path: None,
) -> T:
    """Checks `table` and returns `cls` filled from it; ConfigError lists each fault, and of the
    `overrides` that the table had those that may have made one.

    `explain` says of the path of an unknown key where it belongs, if the caller knows.
    """
    # As JSON, since pydantic takes tables for dataclasses only there when it converts nothing.
    text = json.dumps(table, default=str)
    try:
        return TypeAdapter(cls).validate_json(text, strict=True)
    except ValidationError as problem:
        errors = problem.errors()
    if is_foreign and (whole := _with_whole_numbers(json.loads(text), errors)):
        return fill(cls, whole, where, overrides=overrides, explain=explain)
    faults = {_key_of(error): _describe(cls, error, explain) for error in errors}
    is_lacking = all(error["type"] in MISSING for error in errors)
    raise ConfigError(
        "; ".join(faults.values()),
        where=with_set(where, overrides, faults) if overrides else where,
        fix="add what is missing" if is_lacking else "correct the named keys",
    )


def _with_whole_numbers(table: dict[str, Any], errors: Sequence[Any]) -> dict[str, Any] | None:
    """`table` with an integer in place of each whole float that was refused; None if none was."""
    is_changed = False
    for error in errors:
        found = error["input"]
        if error["type"] == "int_type" and isinstance(found, float) and found.is_integer():
            *parents, last = _path_of(error)
            place: Any = table
            for part in parents:
                place = place[part]
            place[last] = int(found)
            is_changed = True
    return table if is_changed else None


def _path_of(error: Any) -> list[Any]:
    parts = error["loc"]
    return [p for p in parts if not str(p).startswith("function-") and p not in UNION_MEMBERS]


def _key_of(error: Any) -> str:
    return ".".join(str(part) for part in _path_of(error))


def _describe(cls: type, error: Any, explain: Callable[[Sequence[Any]], str | None]) -> str:
    path, key = _path_of(error), _key_of(error)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if (reason := explain(path)) is not None:
            return f"unknown key {key!r}: {reason}"
        valid = _keys_at(cls, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), valid, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; valid keys: {', '.join(valid)}"
        return f"unknown key {key!r}{hint}"
    if error["type"] in MISSING:
        needed = _required(_class_at(cls, path))
        return (
            f"missing section [{key}] with {listing(needed)}" if needed else f"missing key {key!r}"
        )
    message = str(error["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict) else f" (found {_shown(error['input'])})"
    return f"{key}: {message}{found}" if key else f"{message}{found}"  # which names its keys


def _shown(value: object) -> str:
    """A value as its file has it, but for text, whose quotes are Python's."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def descriptions(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, of a settings class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = str(text.value.value)
    return found


def has_key(cls: type, path: Sequence[Any]) -> bool:
    """Whether a settings class has this key, or one of its sections does."""
    return str(path[-1]) in _keys_at(cls, path[:-1])


def _keys_at(cls: Any, path: Sequence[Any]) -> list[str]:
    found = _class_at(cls, path)
    return [field.name for field in fields(found)] if is_dataclass(found) else []


def _required(cls: Any) -> list[str]:
    """The keys without a default of a settings class; none of what is no such class."""
    known = getattr(cls, "__pydantic_fields__", {})
    return [name for name, field in known.items() if field.is_required()]


def _class_at(cls: Any, path: Sequence[Any]) -> Any:
    """The settings class that stands at this place in a file; None if none does."""
    for part in path:
        if isinstance(part, int):
            continue
        hint = get_type_hints(cls).get(part) if is_dataclass(cls) else None
        candidates = [hint, *get_args(hint)]
        cls = next((c for c in candidates if isinstance(c, type) and is_dataclass(c)), None)
    return cls
