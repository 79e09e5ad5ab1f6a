"""`rorqual plan --train`, and what `rorqual train --dry-run` says of ranks. Oracles: the plan's own
functions, the report's numbers, a folder in which nothing is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run

import in_process
from rorqual.plan.gpu_hours import extension_hours, fitted_mfu

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("671b", ["2,048 ranks: pp 16 x dp_shard 2 x ep 64", "4 routed experts", "ranks 0-127: "]),
        ("16b", ["64 ranks: dp_shard 8 x ep 8; 8 routed experts", "layers 0 to 26, head, 1 MTP"]),
        (
            "small",
            ["1 rank: one rank; 64 routed experts", "embedding, layers 0 to 11, head, 1 MTP"],
        ),
    ],
)
def test_a_dry_run_needs_no_data_weights_or_ranks(
    name: str, said: list[str], tmp_path: Path
) -> None:
    done = in_process.run("train", str(RECIPES / f"{name}.toml"), "--dry-run", folder=tmp_path)
    assert not done.code, done.err
    text = " ".join(done.err.split())
    for words in (*said, "learning rate", "gamma", "lambda", "gradients", "moments", "in all"):
        assert words in text, words
    assert list(tmp_path.iterdir()) == []


def test_the_first_steps_are_the_reports(tmp_path: Path) -> None:
    """§4.2: 3,072 sequences of 4,096 tokens, lambda 0.3, gamma 0.001, the rate from 0."""
    recipe = str(RECIPES / "671b.toml")
    done = in_process.run("train", recipe, "--dry-run", folder=tmp_path)
    row = next(line.split() for line in done.err.splitlines() if line.startswith("1 "))
    assert row == ["1", "12,582,912", "3,072", "1.006e-07", "0.001", "0.3"]


def test_v3_on_the_reports_machines() -> None:
    done = run("plan", RECIPES / "671b.toml", "--train", "--on", "2048xH800", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["ranks"], found["experts_by_rank"]) == (2048, 4)
    assert found["device_hours"] == pytest.approx(2.664e6)
    assert found["days"] == pytest.approx(2.664e6 / 2048 / 24)
    assert found["mfu"] == fitted_mfu()
    assert found["extension_hours"] == extension_hours()
    assert len(found["stages"]) == 16
    ranks = [stage["ranks"] for stage in found["stages"]]
    assert ranks[0] == [0, 127]
    assert ranks[-1] == [1920, 2047]
    for stage in found["stages"]:
        memory = stage["memory_bytes"]
        parts = [memory[name] for name in memory if name not in ("total", "host")]
        assert memory["total"] == sum(parts)
        assert len(stage["stages"]) == 2, "two stages a rank, in a V"
    assert "embedding" in found["stages"][0]["stages"][0]
    assert "head" in found["stages"][0]["stages"][1], "§3.2.2: both on one rank"
    assert [each["num_micro_batches"] for each in found["pipeline"]] == [24, 120]
    shares = [each["bubble_share"] for each in found["pipeline"]]
    assert 0 < shares[1] < shares[0] < 0.5


def test_what_is_printed() -> None:
    done = run("plan", RECIPES / "671b.toml", "--train", "--on", "H800")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "training on 2048xH800" in text
    assert "14,800,000,000,000 tokens take 2,664,000.0 hours of one H800, 54.2 days" in text
    assert "of its context extension this share foretells" in text
    assert "where the report says 119,000" in text
    assert "to experts of other nodes" in text
    assert "DeepSeek-V3 report" in text


def test_an_order_that_cannot_run_is_told() -> None:
    """DualPipeV wants two micro-batches for each rank, and the ramp begins with 24 for 16."""
    words = ("plan", RECIPES / "671b.toml", "--train", "--on", "H800")
    done = run(*words, "--set", "parallel.order=dualpipev")
    assert done.code == 2
    text = " ".join(done.err.split())
    assert "too few micro-batches for this pipeline order: 24, where it takes at least 32" in text
    assert "batches of 3072 sequences" in text


def test_what_does_not_fit_says_what_would() -> None:
    done = run(
        "plan", "tiny", "--train", "--on", "RTX3090", "--set", "training.micro_batch_size=2048"
    )
    text = " ".join(done.out.split())
    assert "does not fit" in text
    assert "fits with --set training.activation_checkpointing=layers" in text
    assert "fits with --set training.micro_batch_size=1" in text


def test_a_model_and_a_file_of_ones_own(tmp_path: Path) -> None:
    """A preset trains on a trillion tokens unless it is said otherwise."""
    box = tmp_path / "box.toml"
    box.write_text('name = "box"\nmemory_gb = 48\nbandwidth_gb_s = 864\nbf16_tflops = 300\n')
    words = ("plan", "small", "--train", "--on", box, "--json")
    found = json.loads(run(*words).out)
    assert found["total_tokens"] == 10**12
    assert (found["ranks"], found["fits"]) == (1, True)
    less = json.loads(run(*words, "--set", "training.total_tokens=1000000000").out)
    assert less["device_hours"] == pytest.approx(found["device_hours"] / 1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "64"), "--context with --train"),
        (("--kv", "fp8", "--batch", "2"), "--kv, --batch with --train"),
        (("--on", "4xH800"), "wants another number of devices"),
        (("--set", "parallel.ep=3"), "cannot be divided among so many ranks"),
        (("--set", "training.nonsense=1"), "unknown key 'training.nonsense'"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str) -> None:
    on = () if "--on" in words else ("--on", "H800")
    done = run("plan", "small", "--train", *on, *words)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_set_is_for_training() -> None:
    done = run("plan", "small", "--on", "H800", "--set", "training.threads=1")
    assert done.code == 2
    assert "--set is for --train" in done.err
