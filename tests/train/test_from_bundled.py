"""A run that begins from the bundled model keeps what that says of its use.

Oracle: the bundled model's own files and weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import STAGES

import rorqual
from rorqual.errors import TrainingError, UsageError
from rorqual.train import train
from rorqual.train.checkpoint import find_checkpoint
from rorqual.train.prepare import prepare, refuse_to_move_what_is_read
from rorqual.train.recipe import recipe_of

BUNDLED = Path(rorqual.__file__).parent / "tiny"
LENGTH = 64


def recipe_table(folder: Path, init_from: str, num_steps: int) -> dict[str, object]:
    return {
        "name": "more",
        "stage": "sft",
        "init_from": init_from,
        "data": {"folder": str(folder / "tokens"), "sources": [{"path": str(folder / "c.jsonl")}]},
        "training": {
            "total_tokens": num_steps * 2 * LENGTH,
            "sequence_length": LENGTH,
            "micro_batch_size": 2,
        },
        "batch_ramp": {"start": 2, "end": 2},
        "lr_schedule": {"peak": 1e-5, "low": 1e-5, "final": 1e-5, "warmup": 0.0},
        "checkpoint": {"every_tokens": 2 * LENGTH},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {n} + 1?"},
                    {"role": "assistant", "content": f"{n + 1}"},
                ]
            }
        )
        for n in range(40)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def begin(
    folder: Path, init_from: str, run: str = "run", num_steps: int = 2, **sections: Any
) -> Path:
    recipe = recipe_of(recipe_table(folder, init_from, num_steps) | sections, STAGES)
    data = prepare(recipe)
    return train(recipe, folder / run, data, is_quiet=True).checkpoint


def test_tiny_is_fine_tuned_by_name_and_keeps_its_card(folder: Path) -> None:
    made = begin(folder, "tiny")
    card = json.loads((BUNDLED / "chat.json").read_text())
    assert json.loads((made / "chat.json").read_text()) == card
    ours, theirs = rorqual.load(made), rorqual.load(BUNDLED)
    assert ours.config == theirs.config
    for (name, after), before in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(after, before, atol=1e-3), name  # two steps at 1e-5 move little
    assert not torch.equal(ours.model.norm.weight, theirs.model.norm.weight)


def test_advice_is_kept_over_stages_and_when_the_origin_is_gone(folder: Path) -> None:
    origin = folder / "origin"
    shutil.copytree(BUNDLED, origin)
    advice = {"temperature": 0.7, "top_p": 0.9, "eos_token_id": [1, 5], "repetition_penalty": 1.1}
    (origin / "generation_config.json").write_text(json.dumps(advice))
    first = begin(folder, str(origin), "one")
    second = begin(folder, str(folder / "one"), "two", model={"rope_theta": 5000.0})
    for made in (first, second):
        kept = json.loads((made / "generation_config.json").read_text())
        assert kept == {"bos_token_id": 0, "pad_token_id": 2, **advice}
        assert (made / "chat.json").is_file()
    (first / "chat.json").write_text(json.dumps({"opening": "changed between two sessions"}))
    again = begin(folder, str(origin), "one")  # finished already: nothing is written anew
    assert json.loads((again / "chat.json").read_text())["opening"].startswith("changed")


def test_ends_of_another_tokenizer_are_left_out(folder: Path) -> None:
    """A checkpoint without a tokenizer does not say what its ids mean; how it is sampled stays."""
    origin = folder / "origin"
    shutil.copytree(BUNDLED, origin)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (origin / name).unlink()
    (origin / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [7, 9]}')
    made = begin(folder, str(origin), tokenizer={"folder": "tiny"})
    kept = json.loads((made / "generation_config.json").read_text())
    assert kept["temperature"] == 0.7
    assert kept["eos_token_id"] == rorqual.load_tokenizer("tiny").eos_id
    assert (made / "chat.json").read_bytes() == (BUNDLED / "chat.json").read_bytes()


def test_a_file_is_no_start(folder: Path) -> None:
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(TrainingError, match=r"rorqual convert .*model\.gguf FOLDER --to bf16"):
        find_checkpoint(file)


@pytest.mark.parametrize("key", ["init_from", "data.folder", "tokenizer.folder", "data.corpora"])
def test_starting_over_never_moves_what_the_recipe_reads(folder: Path, key: str) -> None:
    table = recipe_table(folder, "tiny", 2) | {"tokenizer": {"folder": "tokenizer"}}
    part: Any = table
    *sections, name = key.split(".")
    for section in sections:
        part = part[section]
    part[name] = str(folder / "run" / "inside")
    with pytest.raises(UsageError, match=f"would move {key} away"):
        refuse_to_move_what_is_read(recipe_of(table, STAGES), folder / "run")
    linked = folder / "linked"
    linked.symlink_to(folder / "run")
    part[name] = str(linked / "inside")
    with pytest.raises(UsageError, match=f"would move {key} away"):
        refuse_to_move_what_is_read(recipe_of(table, STAGES), folder / "run")
    beside = folder / "runs"  # a name that only begins so
    refuse_to_move_what_is_read(recipe_of(table, STAGES), beside)
