"""The folder of a run, given where a model is expected, means its latest checkpoint.

Oracle: the same command on that checkpoint's own folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from command import run

import rorqual
from rorqual.bundled import checkpoint_path
from rorqual.errors import CheckpointError
from rorqual.train.checkpoint import find_checkpoint
from rorqual.weights import ModelFolder


@pytest.fixture
def run_folder(tmp_path: Path, model_folder: Path) -> Path:
    folder = tmp_path / "mini"
    for step in (9, 10):
        shutil.copytree(model_folder, folder / "checkpoints" / f"step-{step}")
    shutil.copytree(model_folder, folder / "checkpoints" / ".step-11.0123456789ab")  # a killed save
    (folder / "recipe.toml").write_text('name = "mini"\n')
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "The whale", "--max-new-tokens", "4", "--model"),
        pytest.param(("chat", "--model"), marks=pytest.mark.slow, id="chat"),
        ("eval", "--questions", "1", "--tasks", "dates", "--json"),
        ("inspect", "--json"),
        ("plan", "--on", "1xH100", "--json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_verb_takes_a_run(run_folder: Path, arguments: tuple[str, ...]) -> None:
    latest = run_folder / "checkpoints" / "step-10"
    ours, theirs = (run(*arguments, path, input="hi\n") for path in (run_folder, latest))
    assert ours.code in (0, None), ours.err
    assert ours.out.replace(str(run_folder), str(latest)) == theirs.out


def test_convert_and_verify_take_a_run_and_say_once_which_checkpoint(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rorqual"):
        done = run("convert", run_folder, tmp_path / "bf16", "--to", "bf16", "--verify", "--json")
    assert done.code in (0, None), done.err
    assert json.loads(done.out)["files"] == ["model.safetensors"]
    said = [record.getMessage() for record in caplog.records if "latest" in record.getMessage()]
    assert said == [f"{run_folder} is a run; its latest checkpoint is checkpoints/step-10"]


def test_python_takes_a_run(run_folder: Path) -> None:
    latest = run_folder / "checkpoints" / "step-10"
    assert checkpoint_path(run_folder) == checkpoint_path(str(run_folder)) == latest
    assert find_checkpoint(checkpoint_path(latest)) == latest
    assert rorqual.load(run_folder).config == rorqual.load(latest).config
    num_ids = rorqual.load_tokenizer(latest).vocab_size
    assert rorqual.load_tokenizer(run_folder).vocab_size == num_ids
    assert ModelFolder.find(str(run_folder)).name == "mini"  # as a server names it
    assert ModelFolder.find("tiny", run_folder).load_tokenizer().vocab_size == num_ids


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "young" / "recipe.toml").write_text('name = "young"\n')
    done = run("inspect", tmp_path / "young")
    assert done.code == 2
    assert "this run has saved no checkpoint yet" in done.err
    assert "Ctrl-C saves at once" in done.err


def test_a_model_that_has_a_folder_checkpoints_stays_what_it_is(
    run_folder: Path, model_folder: Path
) -> None:
    shutil.copytree(model_folder, run_folder, dirs_exist_ok=True)
    assert checkpoint_path(run_folder) == run_folder


def test_a_damaged_checkpoint_of_a_run_names_the_one_before(run_folder: Path) -> None:
    latest = run_folder / "checkpoints" / "step-10"
    weights = latest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (run_folder / "checkpoints" / "latest").symlink_to("step-10")
    for path in (run_folder, run_folder / "checkpoints" / "latest"):
        with pytest.raises(CheckpointError) as caught:
            rorqual.load(path)
        fix = str(caught.value.fix)
        assert str(run_folder / "checkpoints" / "step-9") in fix
        assert f"remove {latest}" in fix.replace(str(latest.resolve()), str(latest))
    (latest / "config.json").unlink()
    with pytest.raises(CheckpointError, match="step-9"):
        rorqual.load(latest)
    shutil.rmtree(run_folder / "checkpoints" / "step-9")
    with pytest.raises(CheckpointError, match="the run's only one"):
        rorqual.load(latest)
