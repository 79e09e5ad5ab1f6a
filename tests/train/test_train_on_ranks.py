"""`rorqual train` as torchrun starts it, on two processes: one prepares, writes and speaks, and all
end alike. Oracle: the same recipe on one process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from small_run import MODEL

import in_process
from patience import HANG_SECONDS, wait_until
from rank_programs import Rank
from rorqual import weights
from rorqual.report.timeline_file import read_timeline
from rorqual.train.metrics import read_metrics
from rorqual.train.recipe import toml_text

LENGTH, BATCH = 32, 8
NUM_STEPS = 6
WORDS = "the whale swims under cold water and sings low songs to a far shore".split()
LOSS = 1e-4  # after some steps, in other orders of float32 sums


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) + f" {i}." for i in range(100)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "words",
        "model": {**MODEL, "vocab_size": 400},
        "tokenizer": {"folder": "tokens/tokenizer", "vocab_size": 400},
        "data": {"folder": "tokens", "held_out": 0.1, "sources": [{"path": "text.jsonl"}]},
        "training": {
            "total_tokens": NUM_STEPS * BATCH * LENGTH,
            "sequence_length": LENGTH,
            "micro_batch_size": 2,
            "threads": 1,
        },
        "batch_ramp": {"start": BATCH, "end": BATCH},
        "lr_schedule": {"peak": 1e-3, "low": 1e-4, "final": 1e-4, "warmup": 0.1},
        "validation": {"max_tokens": 4 * LENGTH},
    }
    (folder / "words.toml").write_text(toml_text(recipe))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def ranks(folder: Path, *arguments: str, world: int = 2) -> Iterator[list[Rank]]:
    """`rorqual train` on each, with the environment that torchrun gives it."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    programs = [
        Rank(
            [sys.executable, "-m", "rorqual", "train", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **place,
                **sizes,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        for rank in range(world)
    ]
    try:
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def ended(programs: list[Rank]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each."""
    told = [program.communicate(timeout=HANG_SECONDS) for program in programs]
    return [(program.returncode, *text) for program, text in zip(programs, told, strict=True)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return weights.load(run / "checkpoints" / "latest").state_dict()


Start = Callable[..., tuple[list[Rank], Path]]
SHARED = ("--set", "parallel.ep=2")  # besides experts, which are divided, all is sharded


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """By two ranks."""
    with ranks(folder, "words.toml", "--run", "runs/two", *SHARED) as programs:
        (code, out, err), (other_code, other_out, other_err) = ended(programs)
    assert (code, other_code) == (0, 0), err + other_err
    assert out.strip() == f"runs/two/checkpoints/step-{NUM_STEPS}"
    assert "finished" in err
    assert other_out == other_err == ""
    return folder / "runs" / "two"


def test_two_ranks_write_what_one_writes(trained: Path, folder: Path) -> None:
    done = in_process.run("train", "words.toml", "--run", "runs/one", folder=folder)
    assert not done.code, done.err
    alone, shared = folder / "runs" / "one", trained
    for one, other in zip(
        read_metrics(alone / "metrics.jsonl"), read_metrics(shared / "metrics.jsonl"), strict=True
    ):
        assert one.keys() <= other.keys()
        for name in ("kind", "step", "tokens", "targets", "batch"):
            assert one.get(name) == other.get(name), name
        assert (other.get("bytes_within_nodes", 0) > 0) == (one["kind"] == "step")
        for name in ("loss", "bits_per_byte"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=LOSS), name
    expected, found = weights_of(alone), weights_of(shared)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        assert float((found[name] - value).abs().max()) <= LOSS, name


def test_a_run_of_two_ranks_goes_on_with_one(trained: Path, folder: Path) -> None:
    longer = f"training.total_tokens={(NUM_STEPS + 2) * BATCH * LENGTH}"
    arguments = ("words.toml", "--run", "runs/two", "--set", longer, "--allow-changes")
    done = in_process.run("train", *arguments, folder=folder)
    assert not done.code, done.err
    assert done.out.strip().endswith(f"step-{NUM_STEPS + 2}")


def test_what_two_ranks_save_is_a_model_for_every_verb(trained: Path, folder: Path) -> None:
    """As it is, and as a beginning; transformers' form is a conversion away."""
    checkpoint = f"runs/two/checkpoints/step-{NUM_STEPS}"
    done = in_process.run("inspect", checkpoint, "--json", folder=folder)
    assert not done.code, done.err
    assert json.loads(done.out)["trained"]["step"] == NUM_STEPS
    done = in_process.run("generate", "--prompt", "the whale", "--model", checkpoint, folder=folder)
    assert not done.code, done.err
    start = ("--set", f"init_from='{checkpoint}'", "--set", "model={}")
    done = in_process.run(
        "train", "words.toml", "--run", "runs/from-two", "--dry-run", *start, folder=folder
    )
    assert not done.code, done.err


def test_started_again_by_torchrun_fresh_is_not_done_twice(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("words.toml", "--run", "runs/fresh")
    for number in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        done = in_process.run("train", *arguments, "--fresh", folder=folder)
        assert not done.code, done.err
    assert "nothing to train" in done.err
    assert not (folder / "runs" / "fresh.old-1").exists()


def test_another_number_of_processes_is_refused_before_any_work(folder: Path) -> None:
    with ranks(folder, "none.toml") as programs:
        told = ended(programs[:1])
    assert told[0][0] == 2
    with ranks(folder, "words.toml", "--run", "runs/wrong") as programs:
        told = ended(programs[:1])
    code, out, err = told[0]
    assert code == 2
    assert out == ""
    assert "2 processes (WORLD_SIZE)" in err
    assert "one rank" in err
    assert "--set parallel.dp_shard=2" in err
    done = in_process.run(
        "train", "words.toml", "--run", "runs/wrong", "--set", "parallel.ep=4", folder=folder
    )
    assert done.code == 2
    assert "torchrun --nproc-per-node 4 -m -- rorqual train" in done.err
    assert not (folder / "runs" / "wrong").exists()


def test_all_end_where_the_first_cannot_prepare(folder: Path) -> None:
    missing = ("--set", "data.folder='elsewhere'", "--set", "data.sources=[{path='missing.txt'}]")
    with ranks(folder, "words.toml", "--run", "runs/missing", *SHARED, *missing) as programs:
        (code, _, err), (other_code, _, other_err) = ended(programs)
    assert (code, other_code) == (2, 2)
    assert "missing.txt" in err
    assert other_err == ""


@pytest.fixture
def stepping(folder: Path) -> Iterator[Start]:
    """Starts a long run, and returns when it makes steps."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> tuple[list[Rank], Path]:
            run = folder / "runs" / name
            long = ("--set", f"training.total_tokens={10**9}", *SHARED, *arguments)
            programs = stack.enter_context(
                ranks(folder, "words.toml", "--run", f"runs/{name}", *long)
            )
            metrics = run / "metrics.jsonl"
            wait_until(lambda: metrics.exists() and metrics.stat().st_size)
            return programs, run

        yield start


def test_a_signal_to_any_rank_ends_all_with_a_checkpoint(stepping: Start) -> None:
    programs, run = stepping("stopped")
    os.kill(programs[1].pid, signal.SIGTERM)
    (code, _, err), (other_code, _, other_err) = ended(programs)
    assert (code, other_code) == (143, 143), err + other_err
    assert "stopped by SIGTERM" in err
    steps = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / f"step-{steps}" / "trainer").is_dir()


def test_a_rank_that_hangs_is_told_with_the_step(stepping: Start) -> None:
    programs, _ = stepping("hung", "--set", "parallel.timeout_seconds=3")
    os.kill(programs[1].pid, signal.SIGSTOP)
    code, _, err = ended(programs[:1])[0]
    assert code == 2, err
    assert "rank 0 of 2 lost another rank in" in err
    assert "parallel.timeout_seconds" in err


@pytest.mark.slow
def test_a_pipeline_writes_what_one_rank_writes_and_goes_on(folder: Path) -> None:
    """Oracle: the same recipe on one process, which also goes on from the pipeline's checkpoint."""
    done = in_process.run("train", "words.toml", "--run", "runs/whole", folder=folder)
    assert not done.code, done.err
    plan = ("--set", "parallel.pp=2", "--set", "parallel.timeline_step=3")
    with ranks(folder, "words.toml", "--run", "runs/stages", *plan) as programs:
        (code, _, err), (other_code, _, other_err) = ended(programs)
    assert (code, other_code) == (0, 0), err + other_err
    alone, stages = folder / "runs" / "whole", folder / "runs" / "stages"
    pairs = zip(
        read_metrics(alone / "metrics.jsonl"), read_metrics(stages / "metrics.jsonl"), strict=True
    )
    for one, other in pairs:
        for name in ("loss", "balance", "bits_per_byte"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=LOSS), name
        assert one.get("load") == other.get("load")
    expected, found = weights_of(alone), weights_of(stages)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= LOSS, name
    timeline = read_timeline(stages / "timeline.json")
    assert timeline is not None
    assert [len(own) for own in timeline.ranks] == [2 * BATCH // 2] * 2  # forwards and backwards
    longer = f"training.total_tokens={(NUM_STEPS + 2) * BATCH * LENGTH}"
    more = ("words.toml", "--run", "runs/stages", "--set", longer, "--allow-changes")
    with ranks(folder, *more, *plan) as programs:
        (code, out, err), (other_code, _, other_err) = ended(programs)
    assert (code, other_code) == (0, 0), err + other_err
    assert out.strip().endswith(f"step-{NUM_STEPS + 2}")


def test_pipelines_that_cannot_be_are_refused_before_the_run(folder: Path) -> None:
    """As `--dry-run` sees them: more stages than layers, too few micro-batches, chunks of 1F1B."""
    for settings, words in (
        (("pp=2", "order=zbv"), "more stages than the model has layers"),
        (("pp=8",), "too few micro-batches"),
        (("pp=2", "chunks=2"), "chunks are for the order interleaved"),
    ):
        sets = [word for setting in settings for word in ("--set", f"parallel.{setting}")]
        done = in_process.run("train", "words.toml", "--dry-run", *sets, folder=folder)
        assert done.code == 2
        assert words in done.err, done.err
