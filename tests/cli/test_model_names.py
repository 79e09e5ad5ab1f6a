"""`tiny` is the bundled model for every verb, a preset is `preset:NAME`, a folder is a path.

Oracles: the files of the bundled model themselves, and the presets' own shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import run

import rorqual
from rorqual.bundled import checkpoint_path
from rorqual.errors import ConfigError, UsageError
from rorqual.model import PRESETS, named_preset
from rorqual.train.checkpoint import find_checkpoint

BUNDLED = Path(rorqual.__file__).parent / "tiny"


def config_of(*arguments: object) -> dict[str, object]:
    done = run("inspect", *arguments, "--json")
    assert done.code in (0, None), done
    config: dict[str, object] = json.loads(done.out)["config"]
    return config


def test_a_text_names_the_bundled_model_and_a_path_never_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of the same name changes nothing
    assert checkpoint_path("tiny") == BUNDLED
    assert checkpoint_path(Path("tiny")) == Path("tiny")
    assert checkpoint_path("./tiny") == Path("./tiny")
    assert find_checkpoint("tiny") == BUNDLED


def test_load_and_its_tokenizer_know_the_name() -> None:
    model, again = rorqual.load("tiny"), rorqual.load(BUNDLED)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokenizer = rorqual.load_tokenizer("tiny")
    assert tokenizer.encode("whale") == rorqual.load_tokenizer(BUNDLED).encode("whale")


def test_inspect_tells_the_bundled_model_from_the_preset() -> None:
    stored = json.loads((BUNDLED / "config.json").read_text())
    bundled, shape = config_of("tiny"), config_of("preset:tiny")
    positions = "max_position_embeddings"
    assert bundled[positions] == stored[positions] == 256
    assert shape[positions] == PRESETS["tiny"].max_position_embeddings != 256
    assert config_of("preset:671b") == config_of("671b") == PRESETS["671b"].to_hf()


@pytest.mark.slow
def test_plan_tells_them_apart_too() -> None:
    def planned(target: str) -> tuple[str, int, int]:
        done = run("plan", target, "--on", "1xH100", "--json")
        assert done.code in (0, None), done
        plan = json.loads(done.out)
        return plan["weights"], plan["context"], plan["memory_bytes"]["weights"]

    assert planned("tiny")[:2] == ("fp8", 256)  # as it is stored, and its own context
    assert planned("preset:tiny")[:2] == ("bf16", PRESETS["tiny"].max_position_embeddings)
    assert planned("preset:671b") == planned("671b")


def test_convert_takes_the_name(tmp_path: Path) -> None:
    done = run("convert", "tiny", tmp_path / "bf16", "--to", "bf16", "--verify")
    assert done.code in (0, None), done
    assert (tmp_path / "bf16" / "chat.json").read_bytes() == (BUNDLED / "chat.json").read_bytes()


def test_a_preset_and_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "16b").mkdir()
    with pytest.raises(UsageError, match=r"preset:16b for the preset, \./16b for what lies here"):
        named_preset("16b")
    assert named_preset("preset:16b") == PRESETS["16b"]
    assert named_preset("./16b") is None
    for verb in (("inspect", "16b"), ("plan", "16b", "--on", "1xH100")):
        assert run(*verb).code == 2


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_what_is_neither_is_said(verb: str) -> None:
    done = run(verb, "672b")
    assert done.code == 2
    assert "neither a checkpoint nor a preset" in done.err
    assert "preset:671b" in done.err
    assert "'tiny'" in done.err
    with pytest.raises(ConfigError, match="there is no preset"):
        named_preset("preset:672b")


def test_eval_says_what_to_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "tiny.toml"
    monkeypatch.chdir(tmp_path)
    done = run("eval", "tiny", "--questions", "1", "--recipe", recipe)
    assert done.code == 2
    assert "token shards are not built" in done.err
    assert f"rorqual data fetch {recipe}; then rorqual data build {recipe}" in done.err
    assert done.out == ""  # said before any question is asked


def test_eval_wants_real_text_for_bits_per_byte(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "tiny-sft.toml"
    done = run("eval", "tiny", "--recipe", recipe)
    assert done.code == 2
    assert "generated text only" in done.err
