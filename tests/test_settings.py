"""Types of settings: nothing is converted in our own files, whole numbers are in others'.

Oracle: each wrong value by hand, against every field of a type in every settings dataclass.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import ValidationError

from rorqual.cli.serve import SetOptions
from rorqual.config import apply_overrides, fill, read_toml, settings
from rorqual.data import DataSettings, Inputs, SourceSettings, TokenizerSettings
from rorqual.data.settings import BuildSettings
from rorqual.errors import ConfigError
from rorqual.model import ModelConfig, preset
from rorqual.model.config import YarnScaling
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.simulator import Durations
from rorqual.plan.machine_file import MachineFile
from rorqual.serve.settings import ServerSettings
from rorqual.train import Recipe
from rorqual.train.checkpoint import Progress
from rorqual.train.ema import EmaSettings
from rorqual.train.lr_schedule import BalanceSettings, BatchRamp, LrSchedule, MtpSettings
from rorqual.train.metrics import MetricsSettings
from rorqual.train.optimizer import OptimizerSettings
from rorqual.train.recipe import CheckpointSettings, TrainingSettings, ValidationSettings
from rorqual.train.spikes import Skip, SpikeSettings
from rorqual.train.stages import Pretrain, Sft
from rorqual.train.stages.corpora import CorporaStage, CorporaTraining
from rorqual.weights.advice import ChatCard, SamplingDefaults

CLASSES = (
    BalanceSettings, BatchRamp, BuildSettings, ChatCard, CheckpointSettings, CorporaStage,
    CorporaTraining, DataSettings, Durations, EmaSettings, SetOptions, Inputs, LrSchedule,
    MachineFile, MetricsSettings, ModelConfig, MtpSettings, OptimizerSettings, ParallelSettings,
    Pretrain, Progress, Recipe, SamplingDefaults, ServerSettings, Sft,
    Skip, SourceSettings, SpikeSettings, TokenizerSettings, TrainingSettings, ValidationSettings,
)  # fmt: skip
WRONG: dict[type, tuple[Any, ...]] = {
    int: ("100", True, 2.5, [1]),
    float: ("0.1", True, [0.1]),
    bool: ("yes", 1, 0.0),
    str: (7, True, ["x"]),
}


def cases() -> list[tuple[type, str, Any]]:
    """(class, field, value of a type that it does not take)."""
    found: list[tuple[type, str, Any]] = []
    for cls in CLASSES:
        for name, hint in get_type_hints(cls).items():
            if get_origin(hint) is Literal:
                continue
            members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            kinds = [kind for kind in members if kind in WRONG]
            if kinds:
                kind = float if float in kinds else kinds[0]
                found += [(cls, name, value) for value in WRONG[kind]]
                if kinds == [int]:
                    found.append((cls, name, 2.0))
    return found


@pytest.mark.parametrize(("cls", "name", "value"), cases())
def test_wrong_types_are_named(cls: type, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        fill(cls, {name: value}, where="recipe.toml")
    faults = str(caught.value).splitlines()[0].removeprefix("recipe.toml: ").split("; ")
    fault = next(fault for fault in faults if fault.startswith(f"{name}: "))
    assert "Input should be a valid" in fault
    assert "(found " in fault


@pytest.mark.parametrize(("cls", "name", "value"), cases())
def test_wrong_types_are_refused_in_python_too(cls: type, name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        cls(**{name: value})
    assert name in {str(error["loc"][0]) for error in caught.value.errors()}


def test_every_settings_class_is_checked_here() -> None:
    import ast
    from pathlib import Path

    import rorqual

    found = set()
    for path in Path(rorqual.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(mark, ast.Name) and mark.id == "settings" for mark in node.decorator_list
            ):
                found.add(node.name)
    assert found - {"YarnScaling"} == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", [*CLASSES, YarnScaling], ids=lambda cls: cls.__name__)
def test_no_field_takes_what_is_no_number(cls: type) -> None:
    for name, hint in get_type_hints(cls).items():
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        for value in (float("inf"), -float("inf"), float("nan")) if float in members else ():
            with pytest.raises(ConfigError, match=rf"\b{name}: .*finite number"):
                fill(cls, {name: value})


@settings
class Inner:
    count: int
    share: float = 0.5


@settings
class Outer:
    inner: Inner
    amount: int | float = 1
    items: list[Inner] | None = None


def test_whole_numbers_of_other_programs_are_taken() -> None:
    table = {"inner": {"count": 1e6, "share": 1}, "items": [{"count": 2.0}], "amount": 3.0}
    found = fill(Outer, table, is_foreign=True)
    assert (found.inner.count, found.inner.share, found.items) == (1_000_000, 1.0, [Inner(count=2)])
    assert type(found.inner.count) is int
    assert type(found.amount) is float
    for value in ("2", True, 2.5):
        with pytest.raises(ConfigError, match=r"inner\.count: .*integer"):
            fill(Outer, {"inner": {"count": value}}, is_foreign=True)


def test_an_integer_is_a_number_everywhere() -> None:
    assert fill(Inner, {"count": 1, "share": 1}).share == 1.0


def test_config_json_in_the_wild() -> None:
    table = preset("671b").to_hf()
    table |= {"rope_theta": 10000, "max_position_embeddings": 163840.0, "n_routed_experts": 256.0}
    assert ModelConfig.from_hf(table) == preset("671b")
    with pytest.raises(ConfigError, match=r"hidden_size: .*integer.*'7168'"):
        ModelConfig.from_hf({**table, "hidden_size": "7168"})


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("inner.count='100'", "inner.count: Input should be a valid integer (found '100')"),
        ("inner.count=true", "inner.count: Input should be a valid integer (found true)"),
        ("inner.count=2.0", "inner.count: Input should be a valid integer (found 2.0)"),
        ("inner.share=many", "inner.share: Input should be a valid number (found 'many')"),
        ("amount=[]", "amount: Input should be a valid number (found [])"),
        ("inner.count=1979-05-27", "(found '1979-05-27')"),
        ("inner=3", "inner: Input should be an object (found 3)"),
    ],
)
def test_overrides_are_checked_like_the_file(override: str, fault: str) -> None:
    table = apply_overrides({"inner": {"count": 1}}, [override])
    with pytest.raises(ConfigError) as caught:
        fill(Outer, table, where="a.toml")
    assert str(caught.value).startswith("a.toml: ")
    assert fault in str(caught.value)


def test_each_kind_of_field_is_known() -> None:
    """No field may escape `cases` unseen."""
    known = {int, float, bool, str, type(None)}
    for cls in CLASSES:
        assert is_dataclass(cls)
        hints = get_type_hints(cls)
        for field in fields(cls):
            hint = hints[field.name]
            members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            for kind in members:
                is_other = get_origin(kind) in (Literal, list, tuple, dict)
                is_other |= is_dataclass(kind) or kind.__name__ == "Path"
                assert kind in known or is_other, (cls, field.name)


@pytest.mark.parametrize("value", ["1" * 5000, "-" + "1" * 5000, "[" * 100_000])
def test_values_beyond_what_python_reads_are_told(tmp_path: Path, value: str) -> None:
    """Python reads no integer of more than 4,300 digits, and goes no deeper than its stack."""
    file = tmp_path / "recipe.toml"
    file.write_text(f"seed = {value}\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(file)
    # On the command line what is no TOML is text.
    assert apply_overrides({}, [f"seed={value}"]) == {"seed": value}


def test_spaces_around_the_sign_of_an_override_mean_nothing() -> None:
    found = apply_overrides({}, [" training.total_tokens = 3"])
    assert found == {"training": {"total_tokens": 3}}


def test_a_value_may_hold_the_sign_of_an_override() -> None:
    found = apply_overrides({}, ['data.folder="a=b=c"', "text=x=y"])
    assert found == {"data": {"folder": "a=b=c"}, "text": "x=y"}
