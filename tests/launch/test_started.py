"""launch/torchrun.sh starts a run that ends. Oracle: the run's own checkpoint, and its metrics
equal those of one process.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patience import HANG_SECONDS
from rorqual.train.recipe import toml_text

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "torchrun.sh"
WORDS = "the whale swims under cold water and sings low songs to a far shore".split()
SHAPE = {
    "preset": "tiny",
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}
pytestmark = [pytest.mark.slow, pytest.mark.concurrency]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    text = "".join(" ".join(rng.choices(WORDS, k=30)) + f" {i}.\n\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    recipe: dict[str, Any] = {
        "name": "started",
        "model": SHAPE,
        "tokenizer": {"folder": "tokens/tokenizer", "vocab_size": 450},
        "data": {"folder": "tokens/text", "held_out": 0.1, "sources": [{"path": "text.txt"}]},
        "training": {
            "total_tokens": 3 * 4 * 16,
            "sequence_length": 16,
            "micro_batch_size": 2,
            "threads": 1,
        },
        "batch_ramp": {"start": 4, "end": 4},
    }
    (tmp_path / "recipe.toml").write_text(toml_text(recipe))
    return tmp_path


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    binaries = Path(sys.executable).parent
    path = f"{binaries}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(SCRIPT), "recipe.toml", *words, "--device", "cpu"],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*processes: subprocess.Popen[str]) -> str:
    """What they printed, once all have ended well."""
    outs = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=HANG_SECONDS * 5)
            assert process.returncode == 0, errors
            outs.append(out)
    finally:
        for process in processes:
            process.kill()
    return "".join(outs)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_one_machine_and_two_end_where_one_process_does(folder: Path) -> None:
    two = ("--set", "parallel.dp_shard=2", "--set", "training.micro_batch_size=1")
    ended(start(folder, "--run", "runs/one", NPROC_PER_NODE="1"))
    ended(start(folder, "--run", "runs/both", *two, NPROC_PER_NODE="2"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"NNODES": "2", "HEAD": "127.0.0.1", "PORT": port, "NPROC_PER_NODE": "1"}
    machines = [start(folder, "--run", "runs/two", *two, **meeting) for _ in range(2)]
    out = ended(*machines)
    assert out.split() == ["runs/two/checkpoints/step-3"], "the first rank says where it is"
    expected = losses(folder / "runs" / "one")
    assert len(expected) == 3
    for name in ("both", "two"):
        assert losses(folder / "runs" / name) == pytest.approx(expected, rel=1e-5)
        assert (folder / "runs" / name / "checkpoints" / "latest").exists()
