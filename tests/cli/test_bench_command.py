"""`rorqual bench`. What it starts runs in this process here, but for one slow test: Python's start
and torch's import take seconds. Oracle: the same figures in the table, the file and `--json`.
"""

from __future__ import annotations

import errno
import io
import json
import re
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from command import run, start

from rorqual.bench import rounds
from rorqual.bench.__main__ import main as child
from rorqual.bench.processes import BenchError, Ended
from rorqual.engine import EngineOptions
from rorqual.model import presets
from rorqual.ops import ceilings
from rorqual.weights import load_config, save
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.model_folder import has_kernels
from small import LITTLE, lively

LITTLE_LOAD = ["--prefill", "16", "--streams", "1,2", "--depth", "4", "--decode-tokens", "4"]
LITTLE_LOAD += ["--threads", "1"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules run here; their names in order."""
    started: list[str] = []

    def here(name: str, command: list[Any]) -> Ended:
        started.append(name)
        assert command[:3] == [sys.executable, "-m", "rorqual.bench"]
        out = io.StringIO()
        with patch.object(sys, "argv", command[2:]), redirect_stdout(out):
            child()
        return Ended(out.getvalue(), "", 0.5, None)

    monkeypatch.setattr(rounds, "run", here)
    monkeypatch.setattr("rorqual.bench.models.run", here)
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "NUM_ROUNDS", 2)
    return started


def test_the_bundled_model(tmp_path: Path, small_machine: list[str]) -> None:
    """A round is the machine, ours, the machine."""
    output, plot = tmp_path / "a.json", tmp_path / "a.png"
    flags = ["--rounds", "1", *LITTLE_LOAD, "--output", output, "--plot", plot]
    done = run("bench", "tiny", *flags)
    assert done.code == 0, done.err
    ceiling = "the machine's ceilings"
    assert small_machine == [ceiling, "rorqual", ceiling]
    table = json.loads(output.read_text())
    assert table["is_complete"]
    assert table["model"] == "tiny"
    assert table["options"]["dtype"] == "auto"
    assert len(table["ceilings"]["read"]["values"]) == 2
    assert {row["operands"] for row in table["ceilings"]["gemm"]} == {"float32", "bf16", "int8"}
    rows = {(row["what"], row["num_tokens"], row["num_streams"]): row for row in table["rows"]}
    for key in (("prefill", 16, 1), ("decode", 4, 1), ("decode", 4, 2)):
        row = rows[key]
        (value,), (limit,) = row["values"], row["limits"]
        assert row["median"] == value
        assert row["share"]["median"] == pytest.approx(value / limit)
    experts = [rows["decode", 4, streams]["work"]["experts"] for streams in (1, 2)]
    assert experts[0] == 2 < experts[1] <= 4  # the model's tokens choose two of eight
    assert {"load", "first_token", "start", "memory", "known_prefix"} <= {key[0] for key in rows}
    auto = "BF16" if has_kernels(torch.device("cpu")) else "float32"
    assert table["forms"]["rorqual"]["storages"] == auto
    assert plot.read_bytes().startswith(PNG)
    for words in ("read rate:", "torch._int_mm", "decode, 2 streams after 4", "one round"):
        assert words in done.out
    (memory,) = [line for line in done.out.splitlines() if line.startswith("peak memory  ")]
    assert memory.split()[-1] == "MB"


def test_without_a_model_the_machine_alone(small_machine: list[str], tmp_path: Path) -> None:
    with patch.dict(presets.PRESETS, {"mid": LITTLE}):
        done = run("bench", "--rounds", "2", "--threads", "1", "--json")
    assert done.code == 0, done.err
    table = json.loads(done.out)
    assert small_machine == ["the machine's ceilings"] * 2
    assert (table["model"], table["rows"]) == (None, [])
    assert all(row["flops"] > 0 for row in table["ceilings"]["gemm"])


def test_a_presets_random_weights_are_kept_if_asked(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    flags = [*LITTLE_LOAD, "--rounds", "2", "--json", "--keep", folder, "--dtype", "bfloat16"]
    with patch.dict(presets.PRESETS, {"little": LITTLE}):
        done = run("bench", "preset:little", *flags)
        assert done.code == 0, done.err
        table = json.loads(done.out)
        assert table["forms"]["rorqual"]["storages"].startswith("bfloat16")
        assert {len(row["values"]) for row in table["rows"]} == {2}
        assert load_config(folder) == LITTLE
        made = (folder / "model.safetensors").stat().st_mtime_ns
        assert run("bench", "preset:little", *flags).code == 0
        assert (folder / "model.safetensors").stat().st_mtime_ns == made
    done = run("bench", "preset:small", "--keep", folder, *LITTLE_LOAD)
    assert done.code == 2
    assert "another model is kept there" in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    run_here, output = rounds.run, tmp_path / "a.json"

    def until_ours(name: str, command: list[Any]) -> Ended:
        if name == "rorqual":
            signal.raise_signal(number)
        return run_here(name, command)

    monkeypatch.setattr(rounds, "run", until_ours)
    done = run("bench", "tiny", *LITTLE_LOAD, "--output", output)
    assert done.code == code
    assert "read rate:" in done.out
    assert "not complete" in done.out
    table = json.loads(output.read_text())
    assert not table["is_complete"]
    assert len(table["ceilings"]["read"]["values"]) == 1


@pytest.mark.parametrize(
    "problem", [BenchError("rorqual failed", found="killed"), OSError(errno.ENOSPC, "full")]
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_failure_keeps_what_was_measured(
    problem: Exception, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rounds before, whatever fails in the second one."""
    run_here, tried = rounds.run, []

    def fail(name: str, command: list[Any]) -> Ended:
        tried.append(name)
        if tried.count("rorqual") == 2:
            raise problem
        return run_here(name, command)

    monkeypatch.setattr(rounds, "run", fail)
    plot = tmp_path / "a.png"
    done = run("bench", "tiny", *LITTLE_LOAD, "--rounds", "2", "--plot", plot, *flags)
    assert done.code == 2
    assert "killed" in done.err or "the disk is full" in done.err
    if flags:
        table = json.loads(done.out)
        assert not table["is_complete"]
        assert {len(row["values"]) for row in table["rows"]} == {1}
    else:
        assert "decode, 2 streams after 4" in done.out
        assert "not complete" in done.out
    assert plot.read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_written_costs_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("rorqual.bench.plots.write_plot", refuse)
    flags = [*LITTLE_LOAD, "--rounds", "1", "--plot", tmp_path / "a.png"]
    done = run("bench", "tiny", *flags)
    assert done.code == 2
    assert "the disk is full" in done.err
    assert "decode, 2 streams after 4" in done.out


def test_a_peer_that_is_missing_or_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_machine: list[str]
) -> None:
    """Ours goes on; what failed is not tried again in the next round."""
    tried = []

    class Broken:
        name = "vllm"
        form = None

        def measure(self, load: object) -> None:
            tried.append(load)
            raise BenchError("vllm failed", found="out of memory")

    found = ([Broken()], {"transformers": "not installed for python"})
    monkeypatch.setattr("rorqual.bench.find_peers", lambda names, places: found)
    flags = ["--against", "vllm,transformers", "--rounds", "2", *LITTLE_LOAD]
    with patch.dict(presets.PRESETS, {"little": LITTLE}):
        done = run("bench", "preset:little", *flags)
    assert done.code == 0, done.err
    assert "medians of 2 rounds" in done.out
    assert re.search(r"\d to \d", done.out)
    assert "transformers: not installed for python" in done.out
    assert "out of memory" in done.out
    assert len(tried) == 1
    assert small_machine.count("rorqual") == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--against", "ollama"), "unknown peer 'ollama'"),
        (("--against", "vllm"), "peers are measured on a model"),
        (("tiny", "--streams", "1,x"), "--streams takes numbers"),
        (("tiny", "--prefill", "0"), "--prefill takes numbers"),
        (("tiny", "--streams", "9" * 5000), "at most 9 digits"),
        (("tiny", "--streams", "999999999"), "longer than the model's context"),
        (("tiny", "--decode-tokens", "9" * 30), "--decode-tokens"),
        (("--rounds", "1" * 30), "--rounds"),
        (("tiny", "--output", "."), "is a folder, and a file is needed"),
        (("tiny", "--gguf", "x.gguf"), "--gguf is for a peer that is not measured"),
        (("tiny", "--llama-cpp", "."), "give --against llama.cpp too"),
        (("tiny", "--against", "llama.cpp", "--ik-llama-cpp", "."), "--ik-llama-cpp is for"),
        (("tiny", "--vllm", "python"), "--vllm is for a peer"),
        (("tiny", "--against", "ik_llama.cpp", "--gguf", "no.gguf"), "no.gguf"),
        (("tiny", "--prefill", "512"), "longer than the model's context"),
        (("tiny", "--depth", "500"), "longer than the model's context"),
        (("tiny", "--threads", "0"), "--threads is out of range"),
        (("tiny", "--device", "cuda"), "cuda"),
        (("tiny", "--keep", "x"), "--keep is for a preset"),
        (("tiny", "--kernels", "fast"), "unknown kernels"),
        (("tiny", "--kv-cache-dtype", "int3"), "unknown dtype of the cache"),
        (("nowhere",), "nowhere"),
        (("preset:671b", "--streams", "1"), "the disk has no room"),
    ],
)
def test_errors(flags: tuple[str, ...], words: str, small_machine: list[str]) -> None:
    done = run("bench", *flags)
    assert done.code == 2, done
    assert words in done.err
    assert not small_machine


def test_a_place_that_cannot_be_written_is_told_first(
    tmp_path: Path, small_machine: list[str]
) -> None:
    """And a file of before stays until there is something to write."""
    before = tmp_path / "file"
    before.write_text("older figures")
    done = run("bench", "tiny", *LITTLE_LOAD, "--output", before / "a.json")
    assert done.code == 2
    assert not small_machine
    assert run("bench", "nowhere", "--output", before).code == 2
    assert run("bench", "preset:671b", "--streams", "1", "--output", before).code == 2
    assert before.read_text() == "older figures"


@pytest.mark.slow
def test_the_program_itself(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    with start("bench", "tiny", *LITTLE_LOAD, "--rounds", "1", "--output", output) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert b"decode, 2 streams after 4" in out
    table = json.loads(output.read_text())
    (peak,) = (row["values"][0] for row in table["rows"] if row["what"] == "memory")
    assert 1e8 < peak < 5e9


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--speculate", 1], "speculate", 1),
        (["--cache-memory", "2MiB"], "cache_memory", 2 << 20),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype", "fp8"),
        (["--max-model-len", 77], "max_model_len", 77),
        (["--batch-invariant"], "is_batch_invariant", True),
        (["--dtype", "stored"], "dtype", "stored"),
        (["--kernels", "plain"], "kernels", "plain"),
    ],
)
def test_flags_of_the_engine_arrive(
    flags: list[object], name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    def stop(bench: rounds.Bench, report: object) -> None:
        sent.update(bench.options)

    monkeypatch.setattr(rounds.Bench, "run", stop)
    load = ["--prefill", "8", "--streams", "1", "--depth", "4", "--decode-tokens", "2"]
    done = run("bench", "tiny", *load, *flags)
    assert done.code == 0, done.err
    assert sent[name] == value
    EngineOptions(**sent)


def test_a_file_without_a_tokenizer_runs_as_it_is_stored(tmp_path: Path) -> None:
    """Its own types are counted; and settings cross: drafts have no share, since what they read is
    not counted.
    """
    folder, file = tmp_path / "m", tmp_path / "m.gguf"
    save(lively(LITTLE), folder, dtype="float32")
    convert(folder, file, Options(Target.parse("gguf:Q8_0")))
    flags = [*LITTLE_LOAD, "--rounds", "1", "--json"]
    stored = run("bench", file, "--dtype", "stored", "--kv-cache-dtype", "q8", *flags)
    assert stored.code == 0, stored.err
    table = json.loads(stored.out)
    assert table["forms"]["rorqual"]["storages"].startswith("Q8_0")
    assert all(row["share"] for row in table["rows"] if row["what"] in ("decode", "prefill"))
    drafted = run("bench", folder, "--speculate", 1, "--batch-invariant", *flags)
    assert drafted.code == 0, drafted.err
    rows = json.loads(drafted.out)["rows"]
    # This process has had its peak: what a small model adds to it may be nothing.
    assert {row["what"] for row in rows if row["values"][0] <= 0} <= {"own_memory"}
    assert {row["what"] for row in rows if row["share"]} == {"prefill"}
