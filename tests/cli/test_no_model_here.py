"""What is no model is called so before anything else that it lacks. Oracle: what lies there."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run

import rorqual
import rorqual.engine
import rorqual.weights
from rorqual.errors import CheckpointError

VERBS = ("chat", "generate", "serve", "eval", "inspect", "convert")


def flags_of(verb: str, path: Path, tmp_path: Path) -> list[object]:
    if verb in ("eval", "inspect"):
        return [path]
    if verb == "convert":
        return [path, tmp_path / "out", "--to", "bf16"]
    more = {"generate": ["--prompt", "a"], "serve": ["--port", 0]}.get(verb, [])
    return ["--model", path, *more]


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_without_a_model(verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "whale.png").write_bytes(b"\x89PNG")
    done = run(verb, *flags_of(verb, folder, tmp_path))
    assert (done.code, done.out) == (2, "")
    assert f"{folder}: no model here" in done.err
    assert "found:    whale.png" in done.err
    assert "GGUF" in done.err


def test_the_name_of_a_preset_is_no_model(tmp_path: Path) -> None:
    for verb in ("chat", "serve", "convert"):
        done = run(verb, *flags_of(verb, Path("671b"), tmp_path), folder=tmp_path)
        assert done.code == 2
        assert "671b is a preset, a shape without weights" in done.err
    done = run("chat", "--model", "./tiny", folder=tmp_path)
    assert "preset" not in done.err


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_that_is_no_model_and_a_device(verb: str, tmp_path: Path) -> None:
    empty = tmp_path / "e.gguf"
    empty.touch()
    for path in (empty, Path("/dev/null")):
        done = run(verb, *flags_of(verb, path, tmp_path))
        assert (done.code, done.out) == (2, ""), path
        assert f"{path}: is a file, but no GGUF model" in done.err
        assert "name a GGUF file" in done.err


def test_what_is_not_there_may_be_of_any_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as problem:
        rorqual.load(tmp_path / "nope")
    assert problem.value.what == "no such folder or file"
    assert "rank shards, or a GGUF file" in str(problem.value.expected)


@pytest.mark.parametrize("verb", ["chat", "generate", "serve", "eval"])
def test_tiny_names_the_bundled_tokenizer_too(
    verb: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def load_model(self: rorqual.weights.ModelFolder, *_: object) -> None:
        seen.append(self.load_tokenizer().decode(self.load_tokenizer().encode("whale")))
        raise CheckpointError("far enough")

    monkeypatch.setattr(rorqual.weights.ModelFolder, "load_model", load_model)
    # It has more ids than the model.
    monkeypatch.setattr(rorqual.engine.EngineOptions, "check", lambda *_: None)
    done = run(verb, *flags_of(verb, model_folder, tmp_path), "--tokenizer", "tiny")
    assert "far enough" in done.err
    assert seen == ["whale"]
