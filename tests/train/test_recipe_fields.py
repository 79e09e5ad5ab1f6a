"""Every field of a recipe is read by a run. Oracle: a spy on the dataclasses' attributes.

A field that nothing reads is a knob that does nothing. Reads that compare, copy or check a whole
dataclass do not count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from small_run import MODEL

from rorqual.config import fill
from rorqual.data import DataSettings, SourceSettings, missing_sources
from rorqual.train import train
from rorqual.train.preflight import preview
from rorqual.train.prepare import prepare
from rorqual.train.stages import Pretrain, Sft

LENGTH = 16


def settings_classes(cls: type) -> set[type]:
    """A settings dataclass and those in its fields."""
    found = {cls}
    for hint in get_type_hints(cls).values():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and is_dataclass(kind):
                found |= settings_classes(kind)
    return found


def test_each_field_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        json.dumps({"text": f"The whale number {i} swims to shore {i % 7}."}) for i in range(90)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    table = {
        "name": "spied",
        "model": {**MODEL, "vocab_size": 300},
        "tokenizer": {"folder": "tokens/tokenizer", "vocab_size": 300},
        "data": {"folder": "tokens", "held_out": 0.2, "sources": [{"path": "text.jsonl"}]},
        "training": {"total_tokens": 320, "sequence_length": LENGTH, "micro_batch_size": 2},
        "batch_ramp": {"start": 2, "end": 2},
        "checkpoint": {"every_tokens": 32},
        "lr_schedule": {"warmup": 0.2, "constant_until": 0.4, "cosine_until": 0.7},
        "mtp": {"weight_until": 0.4},
    }
    monkeypatch.chdir(tmp_path)
    recipe = fill(Pretrain, table)
    read: set[tuple[type, str]] = set()

    def spy(cls: type) -> Callable[[Any, str], Any]:
        def get(self: Any, name: str) -> Any:
            caller = sys._getframe(1).f_code
            is_whole = Path(caller.co_filename).name == "dataclasses.py"
            if not is_whole and not caller.co_name.startswith("_check"):
                read.add((cls, name))
            return object.__getattribute__(self, name)

        return get

    classes = settings_classes(Pretrain)
    assert {DataSettings, SourceSettings} < classes
    for cls in classes:
        monkeypatch.setattr(cls, "__getattribute__", spy(cls))
    packaged = fill(DataSettings, {"folder": "tokens", "sources": [{"name": "wordnet"}]})
    assert missing_sources(packaged) == ["wordnet"]
    data = prepare(recipe)
    preview(recipe, tmp_path / "run")
    tuned = fill(Sft, {**table, "stage": "sft", "init_from": "run", "model": {}})
    assert data.tokenizer is not None
    assert tuned.isolation(data.tokenizer) is not None
    train(recipe, tmp_path / "run", data, is_quiet=True)
    unread = {
        f"{cls.__name__}.{field.name}"
        for cls in classes
        for field in fields(cls)
        if (cls, field.name) not in read
    }
    of_others = {"Pretrain.name"}  # the run folder, cli/train.py
    names = ("zero", "timeout_seconds", "chunks", "timeline_step")  # of many ranks
    of_others |= {f"ParallelSettings.{name}" for name in names}
    assert unread == of_others, "fields that nothing reads"
