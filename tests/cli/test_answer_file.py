"""`generate --output-file`: one writer, nothing lost, and what is told. Oracle: the files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import run, start

from patience import HANG_SECONDS, wait_until
from rorqual.cli.answer_file import AnswerFile


def begin(model_folder: Path, folder: Path, num_lines: int) -> tuple[object, ...]:
    (folder / "in.txt").write_text("one\n" * num_lines, encoding="utf-8")
    files = ("--input-file", folder / "in.txt", "--output-file", folder / "out.jsonl")
    return ("generate", "--model", model_folder, *files, "--max-new-tokens", 5)


@pytest.mark.concurrency
def test_a_second_writer_is_refused_and_the_first_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    command = begin(model_folder, tmp_path, 5000)
    partial = tmp_path / "out.jsonl.partial"
    first = start(*command)
    wait_until(lambda: partial.exists() and partial.stat().st_size)
    second = run(*command)
    assert (second.code, second.out) == (2, "")
    assert "another process writes its answers here" in second.err
    assert f"process {first.pid}" in second.err
    first.send_signal(signal.SIGINT)
    err = first.communicate(timeout=HANG_SECONDS)[1].decode()
    num_lines = partial.read_bytes().count(b"\n")
    assert f"{num_lines} of 5000 answers are in" in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.concurrency
def test_sigterm_tells_what_is_left(model_folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.jsonl.partial"
    started = start(*begin(model_folder, tmp_path, 5000))
    wait_until(lambda: partial.exists() and partial.stat().st_size)
    started.send_signal(signal.SIGTERM)
    err = started.communicate(timeout=HANG_SECONDS)[1].decode()
    assert started.returncode == 143, err
    num_lines = partial.read_bytes().count(b"\n")
    assert f"{num_lines} of 5000 answers are in" in err
    assert "Traceback" not in err


def test_what_an_interrupted_run_left_is_not_thrown_away(
    model_folder: Path, tmp_path: Path
) -> None:
    command = begin(model_folder, tmp_path, 2)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("an hour's work\n", encoding="utf-8")
    done = run(*command)
    assert (done.code, done.out) == (2, "")
    assert f"{partial}: holds what an interrupted run has answered" in done.err
    assert "1 answers" in done.err
    assert partial.read_text(encoding="utf-8") == "an hour's work\n"
    partial.write_text("an hour's work\nhalf an ans", encoding="utf-8")
    assert "1 answers" in run(*command).err


@pytest.mark.parametrize("left", ["", "half an ans"])
def test_what_is_no_whole_answer_is_no_loss(model_folder: Path, tmp_path: Path, left: str) -> None:
    command = begin(model_folder, tmp_path, 2)
    (tmp_path / "out.jsonl.partial").write_text(left, encoding="utf-8")
    assert run(*command).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_a_torn_line_alone_is_not_left_behind(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "out.jsonl")

    def torn() -> Iterator[str]:
        file.partial.write_text("half an ans", encoding="utf-8")
        raise OSError(28, "No space left on device")
        yield ""

    with pytest.raises(OSError, match="No space"):
        file.write(torn(), 2)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("/dev/null", "is a pipe or a device, which cannot be read twice"),
        (".", "is a folder"),
        ("nowhere.txt", "no such file"),
    ],
)
def test_what_is_no_file_of_prompts_is_called_what_it_is(
    model_folder: Path, tmp_path: Path, place: str, found: str
) -> None:
    path = tmp_path / place
    done = run("generate", "--model", model_folder, "--input-file", path)
    assert (done.code, done.out) == (2, "")
    assert f"{path}: {found}" in done.err
    shards = ("demo-generate", "--ckpt-path", tmp_path, "--config", tmp_path / "c.json")
    assert f"{path}: {found}" in run(*shards, "--input-file", path).err


def test_answers_never_replace_a_device(model_folder: Path, tmp_path: Path) -> None:
    command = begin(model_folder, tmp_path, 1)
    done = run(*command, "--output-file", "/dev/null")
    assert done.code == 2
    assert "the output would replace a folder or a device" in done.err


def test_half_a_character_in_an_id_comes_back_escaped(model_folder: Path, tmp_path: Path) -> None:
    command = begin(model_folder, tmp_path, 1)
    (tmp_path / "in.jsonl").write_text(r'{"prompt": "a", "id": "\ud800"}', encoding="utf-8")
    done = run(*command, "--input-file", tmp_path / "in.jsonl")
    assert done.code == 0, done.err
    assert r'"id": "\ud800"' in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
