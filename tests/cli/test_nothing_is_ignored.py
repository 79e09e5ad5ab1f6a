"""A flag or a setting that cannot count is refused or told, never dropped in silence. Oracle: the
flags themselves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import run

from rorqual.errors import UsageError
from rorqual.weights.convert import run as conversion
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.gguf.mixes import MIXES


@pytest.mark.parametrize("to", ["bf16", "float32", "gguf:Q8_0", "shards:2:bf16", "hf", "shards:2"])
def test_a_format_of_scales_needs_fp8(model_folder: Path, tmp_path: Path, to: str) -> None:
    place = tmp_path / "out"
    done = run("convert", model_folder, place, "--to", to, "--scale-format", "ue8m0")
    assert done.code == 2
    assert "only FP8 has scales" in done.err
    assert f"--scale-format ue8m0 with --to {to}" in done.err
    assert not place.exists()


def test_a_rank_is_never_cut(model_folder: Path, tmp_path: Path) -> None:
    flags = ("--to", "shards:2", "--max-file-gb", 0.001)
    done = run("convert", model_folder, tmp_path / "out", *flags)
    assert done.code == 2
    assert "a rank has one file" in done.err
    assert "found:    --max-file-gb 0.001" in done.err
    with pytest.raises(UsageError, match="a rank has one file"):
        Options(Target.parse("shards:2"), max_shard_bytes=1e6)


@pytest.mark.parametrize("to", ["hf", "fp8", "shards:2", "shards:2:bf16", "gguf:Q8_0"])
def test_a_target_says_itself(to: str) -> None:
    assert Target.parse(to).text == to
    assert Options(Target.parse("fp8"), scale_format="ue8m0").scale_format == "ue8m0"


def test_the_mixes_are_listed_where_one_is_asked_for() -> None:
    for to in ("gguf", "gguf:", "gguf:Q9"):
        with pytest.raises(UsageError) as problem:
            Target.parse(to)
        assert all(name in str(problem.value.expected) for name in MIXES)
    words = " ".join(run("convert", "--help").out.split())  # by hand there, nothing is imported
    assert f"MIX one of {', '.join(MIXES)}." in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--failures", -3), "--failures"),
        (("--questions", -1), "--questions"),
        (("--questions", 0), "nothing is to be measured"),
        (("--tasks", "dates,letter"), "ask for letters"),
        (("--tasks", "dates,"), "no such task"),
    ],
)
def test_eval_measures_something(flags: tuple[object, ...], words: str) -> None:
    done = run("eval", "tiny", *flags)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_examples_of_eval_stand_one_a_line() -> None:
    lines = [line.strip() for line in run("eval", "--help").out.splitlines()]
    assert "rorqual eval tiny" in lines


def test_what_transformers_would_follow_is_told(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    table = {"num_beams": 4, "typical_p": 0.9, "max_new_tokens": 7, "length_penalty": 1.0}
    (copy / "generation_config.json").write_text(json.dumps(table | {"top_p": 0.9}))
    done = run("generate", "--model", copy, "--prompt", "a", "--max-new-tokens", 2)
    assert done.code == 0
    (line,) = [text for text in caplog.messages if "not followed here" in text]
    for name in ("num_beams", "typical_p", "max_new_tokens"):
        assert f"{name} of generation_config.json" in line
    assert "length_penalty" not in line  # 1.0 is what it is without
    assert "top_p" not in line
    caplog.clear()
    run("generate", "--model", model_folder, "--prompt", "a", "--max-new-tokens", 2)
    assert not any("not followed" in text for text in caplog.messages)


def test_an_interrupted_conversion_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", interrupted)
    done = run("convert", "tiny", tmp_path / "out", "--to", "bf16")
    assert done.code == 130
    assert "The same command goes on where this one stopped." in done.err
