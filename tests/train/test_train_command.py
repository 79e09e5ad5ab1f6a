"""`rorqual train` from text to a checkpoint, its messages, and validation in bits per byte."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_run import MODEL, STAGES

import in_process
from holders import holder, started
from rorqual import weights
from rorqual.data import Batch, Loader
from rorqual.tokenizer import load_tokenizer
from rorqual.train import load_recipe
from rorqual.train.metrics import read_metrics
from rorqual.train.prepare import prepare
from rorqual.train.recipe import toml_text
from rorqual.train.validation import HeldOutText, bytes_of_ids, validate

LENGTH = 32
WORDS = "the whale swims under cold water and sings low songs to a far shore".split()


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`rorqual train` in this process."""
    done = in_process.run("train", *arguments, folder=folder, **variables)
    return subprocess.CompletedProcess(arguments, int(str(done.code or 0)), done.out, done.err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) + f" {i}." for i in range(300)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "words",
        "model": {**MODEL, "vocab_size": 400},
        "tokenizer": {"folder": "tokens/tokenizer", "vocab_size": 400},
        "data": {"folder": "tokens", "held_out": 0.1, "sources": [{"path": "text.jsonl"}]},
        "training": {
            "total_tokens": 16 * 8 * LENGTH,
            "sequence_length": LENGTH,
            "micro_batch_size": 8,
            "threads": 1,
        },
        "batch_ramp": {"start": 8, "end": 8},
        "lr_schedule": {"peak": 1e-2, "low": 1e-3, "final": 1e-3, "warmup": 0.1},
        "validation": {"every_tokens": 8 * 8 * LENGTH},
    }
    (folder / "words.toml").write_text(toml_text(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    done = run("words.toml", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/words/checkpoints/step-16"
    assert "MFU is a share of" in done.stderr
    assert re.search(r"tok/s  MFU \d+%", done.stderr)
    return folder / "runs" / "words"


def test_it_learns_and_validates(trained: Path) -> None:
    records = read_metrics(trained / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    checks = [record for record in records if record["kind"] == "validation"]
    assert [check["step"] for check in checks] == [8, 16]
    assert checks[1]["bits_per_byte"] < checks[0]["bits_per_byte"]
    assert steps[0]["main"] > 5.5 > steps[-1]["main"]
    assert all(0 < step["mfu"] < 1.5 for step in steps)
    phases = {"data", "forward", "backward", "clip", "optimizer"}
    assert all(step["seconds"].keys() >= phases for step in steps)
    assert [step["step"] for step in steps if "validation" in step["seconds"]] == [9]


def test_a_validation_has_the_samples_of_its_tokens_and_one_at_least(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In closed form; all there are at most, and the same ones whatever the recipe's seed."""
    monkeypatch.chdir(folder)
    manifest = json.loads((folder / "tokens/text.jsonl/held_out/manifest.json").read_text())
    there = -(-(manifest["num_tokens"] - 1) // LENGTH)
    assert there > 2
    firsts = []
    for seed, max_tokens, expected in (
        (0, 1, 1), (5, 2 * LENGTH - 1, 1), (0, 2 * LENGTH, 2), (5, 10**9, there),
    ):  # fmt: skip
        changes = [f"validation.max_tokens={max_tokens}", f"seed={seed}"]
        data = prepare(load_recipe(folder / "words.toml", STAGES, changes))
        assert isinstance(data.held_out, HeldOutText)
        assert data.held_out.num_samples == expected
        held_out, learnt = data.held_out.batches.batch(0, 1), data.train.batch(0, 1)
        firsts.append((held_out.tokens_BS.tolist(), learnt.tokens_BS.tolist()))
    assert firsts[0] == firsts[2] != firsts[1] == firsts[3]
    assert firsts[0][0] == firsts[1][0]


def test_bits_per_byte_closed_form(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: full logits and F.cross_entropy, bytes counted by decoding each target."""
    monkeypatch.chdir(folder)
    recipe = load_recipe(folder / "words.toml", STAGES)
    data = prepare(recipe)
    assert data.held_out is not None
    assert data.tokenizer is not None
    model = weights.load(trained / "checkpoints" / "latest")
    found = validate(
        model,
        data.held_out.batches,
        bytes_of_ids(data.tokenizer, 400),
        num_samples=5,
        batch_size=2,
        num_inputs=LENGTH,
    )
    batch = data.held_out.batches.batch(0, 5)
    with torch.no_grad():
        logits_BTV = model(batch.tokens_BS[:, :-1])
    nats, num_bytes = 0.0, 0
    for logits_TV, tokens, mask in zip(logits_BTV, batch.tokens_BS, batch.mask_BS, strict=True):
        losses = F.cross_entropy(logits_TV, tokens[1:], reduction="none").tolist()
        for loss, token, is_target in zip(losses, tokens[1:].tolist(), mask[1:], strict=True):
            size = len(data.tokenizer.bytes_of_text(token))
            if is_target and size:
                nats, num_bytes = nats + loss, num_bytes + size
    assert found.num_bytes == num_bytes
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_sft_takes_the_tokenizer_of_the_checkpoint(trained: Path, folder: Path) -> None:
    recipe = load_recipe(folder / "words.toml", STAGES).table()
    sft = {
        **recipe,
        "name": "tuned",
        "stage": "sft",
        "init_from": "runs/words/checkpoints/latest",
        "tokenizer": None,
        "model": {},
        "training": {
            **recipe["training"],
            "total_tokens": 4 * 8 * LENGTH,
            "isolate_documents": True,
        },
    }
    (folder / "tuned.toml").write_text(toml_text(sft))
    done = run("tuned.toml", folder=folder)
    assert done.returncode == 0, done.stderr
    learnt = "an epoch learns 100 % of"
    assert learnt in done.stderr
    dry = run("tuned.toml", "--dry-run", folder=folder)
    assert learnt in " ".join(dry.stderr.split())
    checkpoint = folder / done.stdout.strip()
    theirs = load_tokenizer(trained / "checkpoints" / "latest")
    assert load_tokenizer(checkpoint).definition == theirs.definition


def test_held_out_conversations_that_do_not_fit_are_left_out(trained: Path, folder: Path) -> None:
    """Nothing is learnt of them and nothing measured on them, which is no reason not to train."""
    messages = [
        {"role": "system", "content": "swim " * 8 * LENGTH},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The whale."},
    ]
    lines = [json.dumps({"messages": [*messages, {"role": "user", "content": n}]}) for n in "abcd"]
    (folder / "long.jsonl").write_text("\n".join(lines) + "\n")
    sources = [{"path": "text.jsonl", "held_out": 0.0}, {"path": "long.jsonl", "held_out": 0.5}]
    table = load_recipe(folder / "words.toml", STAGES).table()
    recipe = {
        **table,
        "name": "long",
        "stage": "sft",
        "init_from": str(trained),
        "tokenizer": None,
        "model": {},
        "data": {"folder": "tokens-long", "sources": sources},
        "training": {**table["training"], "isolate_documents": True},
    }
    (folder / "long.toml").write_text(toml_text(recipe))
    done = run("long.toml", "--set", f"training.total_tokens={8 * LENGTH}", folder=folder)
    assert done.returncode == 0, done.stderr
    kinds = [record["kind"] for record in read_metrics(folder / "runs/long/metrics.jsonl")]
    assert "step" in kinds
    assert "validation" not in kinds


def test_fresh_sets_the_old_run_aside(trained: Path, folder: Path) -> None:
    old = folder / "runs" / "other"
    old.mkdir()
    (old / "kept.txt").write_text("kept")
    limits = ("--set", f"training.total_tokens={8 * LENGTH}")
    done = run("words.toml", "--run", "runs/other", "--fresh", *limits, folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "other.old-1" / "kept.txt").read_text() == "kept"
    assert done.stdout.strip() == "runs/other/checkpoints/step-1"


def test_dry_run_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = run("words.toml", "--run", "runs/dry", "--dry-run", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "runs/dry" in done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_run_exits_as_a_shell_reports_its_signal(
    trained: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    """So `train A && train B` stops; the checkpoint is there, and its place is printed.

    The process sends itself the signal in its first step, so that nothing depends on time.
    """
    batch = Loader.batch

    def signalled(self: Loader, *arguments: int, **options: int) -> Batch:
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
        os.kill(os.getpid(), number)
        return batch(self, *arguments, **options)

    monkeypatch.setattr(Loader, "batch", signalled)
    place = f"runs/{number.name}"
    done = run("words.toml", "--run", place, folder=folder)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == f"{place}/checkpoints/step-1"
    assert f"stopped by {number.name}: saved {place}/checkpoints/step-1" in done.stderr
    assert "run the same command again" in done.stderr


def test_a_step_that_is_not_finite_exits_with_2(trained: Path, folder: Path) -> None:
    rates = [f"lr_schedule.{key}=1e30" for key in ("peak", "low", "final")]
    options = [word for rate in rates for word in ("--set", rate)]
    done = run("words.toml", "--run", "runs/nan", *options, folder=folder)
    assert done.returncode == 2, done.stderr
    assert "not finite; the weights were not moved" in done.stderr


def test_changed_recipes_and_sources_are_seen_on_a_resume(trained: Path, folder: Path) -> None:
    """Of a copy of the finished run, with a copy of its text that then gains a line."""
    shutil.copytree(trained, folder / "runs" / "changed", symlinks=True)
    total = ("--set", f"training.total_tokens={24 * 8 * LENGTH}")
    place = ("--run", "runs/changed")
    done = run("words.toml", *place, *total, folder=folder)
    assert done.returncode == 2
    assert f"training.total_tokens: {16 * 8 * LENGTH} -> {24 * 8 * LENGTH}" in done.stderr
    assert "learning rate 0.001 -> " in done.stderr
    assert "--allow-changes" in done.stderr
    done = run("words.toml", *place, *total, "--allow-changes", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/changed/checkpoints/step-24"
    assert "the recipe was changed, and from here on" in done.stderr
    text = folder / "text.jsonl"
    before = text.read_text()
    try:
        text.write_text(before + json.dumps({"text": "a new song of the whale"}) + "\n")
        for flags in ((), ("--allow-changes",)):
            done = run("words.toml", *place, *total, *flags, folder=folder)
            assert done.returncode == 2
            assert "this run was made with other data" in done.stderr
    finally:
        text.write_text(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.toml",), "no such file"),
        (("words.toml", "--set", "training.total=3"), "unknown key 'training.total'"),
        (
            ("words.toml", "--set", "data.sources=[{name='wordnet'}]", "--run", "runs/x"),
            "rorqual data fetch wordnet",
        ),
    ],
)
def test_faults_are_messages_with_exit_code_2(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments, folder=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs" / "x").exists()


def test_a_run_folder_has_one_run(folder: Path) -> None:
    """A real run holds its folder; killed, it is no obstacle."""
    busy = folder / "runs" / "busy"
    slow = [sys.executable, str(Path(__file__).parent / "small_run.py"), str(busy), "held", "0"]
    limits = ("--set", f"training.total_tokens={8 * LENGTH}")
    with started(slow, "batch 0") as words:
        os.kill(int(words[-1]), signal.SIGSTOP)  # it must not end before the others come
        for start in ((), ("--fresh",)):
            done = run("words.toml", "--run", "runs/busy", *start, *limits, folder=folder)
            assert done.returncode == 2, done.stderr
            assert f"process {words[-1]} on" in done.stderr
            assert "--run" in done.stderr
        assert not (folder / "runs" / "busy.old-1").exists()
        os.kill(int(words[-1]), signal.SIGKILL)
    done = run("words.toml", "--run", "runs/busy", "--fresh", *limits, folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "busy.old-1" / "recipe.toml").is_file()


def test_the_lock_comes_before_the_data(folder: Path) -> None:
    with started(holder(folder / "runs" / "held"), "held"):
        other = ("--set", "data.folder='tokens-of-held'")
        done = run("words.toml", "--run", "runs/held", *other, folder=folder)
    assert done.returncode == 2
    assert not (folder / "tokens-of-held").exists()
