"""What a run refuses comes before anything is written, and `--dry-run` says the same.

Oracle: the files of the data folder before and after, byte for byte; the command's own message.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import MODEL, STAGES

import in_process
import rorqual.tokenizer
from rorqual.data import inputs
from rorqual.data.selection import file_digest
from rorqual.errors import DataError
from rorqual.tokenizer import train_tokenizer
from rorqual.train.metrics import read_metrics
from rorqual.train.preflight import look_ahead, preview
from rorqual.train.prepare import prepare
from rorqual.train.recipe import load_recipe, toml_text
from rorqual.train.stages.corpora_notes import _count

LENGTH = 16
WORDS = "the whale swims under cold water and sings low songs to a far shore".split()
STEP = 2 * LENGTH


def run(*arguments: str, folder: Path) -> in_process.Done:
    return in_process.run("train", *arguments, folder=folder)


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and ".lock" not in file.name
    }


def conversations(*answers: str) -> str:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"{n}?"},
                    {"role": "assistant", "content": a},
                ]
            }
        )
        for n, a in enumerate(answers)
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts, a recipe, and its finished run of two steps."""
    folder = tmp_path_factory.mktemp("preflight")
    rng = random.Random(0)
    (folder / "corpus").mkdir()
    for n in range(2):
        texts = [" ".join(rng.choices(WORDS, k=30)) + f" {n} {i}.\n\n" for i in range(60)]
        (folder / "corpus" / f"t{n}.txt").write_text("".join(texts))
    recipe = {
        "name": "base",
        "model": {**MODEL, "vocab_size": 500},
        "tokenizer": {"folder": "tokens/tokenizer", "vocab_size": 450},
        "data": {"folder": "tokens/base", "held_out": 0.1, "sources": [{"path": "corpus"}]},
        "training": {
            "total_tokens": 2 * STEP,
            "sequence_length": LENGTH,
            "micro_batch_size": 2,
            "threads": 1,
        },
        "batch_ramp": {"start": 2, "end": 2},
    }
    (folder / "base.toml").write_text(toml_text(recipe))
    done = run("base.toml", folder=folder)
    assert not done.code, done.err
    sft = {
        **{key: recipe[key] for key in ("training", "batch_ramp")},
        "name": "sft",
        "stage": "sft",
        "init_from": "runs/base",
        "data": {"folder": "tokens/sft", "held_out": 0.2, "sources": [{"path": "talk.jsonl"}]},
    }
    (folder / "sft.toml").write_text(toml_text(sft))
    (folder / "talk.jsonl").write_text(conversations(*"abcdefghij"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy", symlinks=True)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_refused_resume_names_the_file_and_leaves_the_shards(
    folder: Path, dry: list[str]
) -> None:
    """Of changed, new and gone files; restored, the run goes on."""
    text = folder / "corpus" / "t1.txt"
    before = text.read_text()
    shards, runs = tree(folder / "tokens"), tree(folder / "runs")
    text.write_text(before + "one more line\n")
    done = run("base.toml", *dry, folder=folder)
    assert done.code == 2
    assert "this run was made with other data" in done.err
    assert "corpus/t1.txt has changed in corpus" in done.err
    assert "t0.txt" not in done.err
    text.rename(folder / "corpus" / "t2.txt")
    done = run("base.toml", *dry, folder=folder)
    assert "corpus/t1.txt is gone in corpus, corpus/t2.txt is new in corpus" in done.err
    assert tree(folder / "tokens") == shards
    assert tree(folder / "runs") == runs
    (folder / "corpus" / "t2.txt").unlink()
    text.write_text(before)
    done = run("base.toml", *dry, folder=folder)
    assert not done.code, done.err
    assert tree(folder / "runs") == runs


def test_another_tokenizer_is_named_before_the_shards_are_replaced(folder: Path) -> None:
    train_tokenizer(["another text of other words " * 9] * 3, 400).save(
        folder / "tokens" / "tokenizer"
    )
    shards = tree(folder / "tokens")
    done = run("base.toml", folder=folder)
    assert done.code == 2
    assert "the tokenizer is another" in done.err
    assert tree(folder / "tokens") == shards


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.held_out=0.3", "another recipe; different: data.held_out: 0.1 -> 0.3"),
        ("data.seed=7", "another recipe; different: data.seed"),
        ("tokenizer.vocab_size=400", "another recipe; different: tokenizer.vocab_size"),
        ("training.total_tokens=640", "--allow-changes"),
    ],
)
def test_a_refused_recipe_leaves_the_shards(
    folder: Path, dry: list[str], override: str, message: str
) -> None:
    shards = tree(folder / "tokens")
    done = run("base.toml", *sets(override), *dry, folder=folder)
    assert done.code == 2
    assert message in done.err
    assert tree(folder / "tokens") == shards


def test_shards_that_are_gone_are_built_again_of_the_same_text(folder: Path) -> None:
    shards = tree(folder / "tokens")
    shutil.rmtree(folder / "tokens" / "base")
    (folder / "corpus" / "t0.txt").touch()
    done = run("base.toml", folder=folder)
    assert not done.code, done.err
    del shards["base/build.json"]
    assert shards.items() <= tree(folder / "tokens").items()


def test_the_plan_says_that_a_run_continues_and_what_changes(folder: Path) -> None:
    longer = sets("training.total_tokens=640")
    done = run("base.toml", *longer, "--allow-changes", "--dry-run", folder=folder)
    assert not done.code, done.err
    text = " ".join(done.err.split())
    assert "by continuing runs/base/checkpoints/step-2 at 64 tokens" in text
    assert "training.total_tokens: 64 -> 640" in text
    done = run("base.toml", "--dry-run", folder=folder)
    assert "nothing: runs/base/checkpoints/step-2 has 64 tokens" in " ".join(done.err.split())
    done = run("base.toml", *longer, "--dry-run", "--fresh", folder=folder)
    assert not done.code, done.err
    assert "set aside" in done.err


def test_a_look_ahead_reads_only_what_it_compares(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run has nothing to compare its text with; a run that goes on reads what changed."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("base.toml", STAGES)
    digested: list[str] = []

    def digest(file: Path) -> str:
        digested.append(file.name)
        return file_digest(file)

    monkeypatch.setattr(inputs, "file_digest", digest)
    (folder / "corpus" / "t1.txt").touch()
    look_ahead(recipe, folder / "runs" / "new")
    assert not digested
    look_ahead(recipe, folder / "runs" / "base")
    assert digested == ["t1.txt"]
    gone = load_recipe("base.toml", STAGES, ["data.sources=[{path='gone'}]"])
    with pytest.raises(DataError, match="no such file, folder or glob"):
        look_ahead(gone, folder / "runs" / "new")


def test_what_is_ready_is_looked_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is read once for looking ahead, build and loaders, and anew if it changes."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("base.toml", STAGES)
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, call)

    counted(rorqual.tokenizer, "load_tokenizer")
    counted(inputs, "locate")
    file = folder / "tokens" / "tokenizer" / "tokenizer.json"
    os.utime(file)
    preview(recipe, folder / "runs" / "base")
    prepare(recipe)
    # By looking ahead, by the plan, and by the run itself, which may come later.
    assert sorted(calls) == ["load_tokenizer", "locate", "locate", "locate"]
    os.utime(file, ns=(1, 1))
    prepare(recipe)
    assert calls.count("load_tokenizer") == 2


def test_the_plan_of_generated_text_alone_reads_nothing(folder: Path) -> None:
    """Nothing of it is there before the build, and nothing afterwards."""
    before = tree(folder)
    source = "data.sources=[{name='generated:dialogues', max_documents=20}]"
    place = sets("data.folder=tokens/generated", "tokenizer.folder=tokens/new")
    done = run("base.toml", "--run", "runs/new", "--dry-run", *place, *sets(source), folder=folder)
    assert not done.code, done.err
    assert "token shards are built" in done.err
    assert tree(folder) == before


def test_the_plan_says_how_much_text_there_is(folder: Path) -> None:
    """The bytes of both files; generated text is not there yet."""
    (folder / "corpus" / "more.jsonl").write_text('{"text": "and one more"}\n')
    sources = "data.sources=[{path='corpus'}, {name='generated:dialogues', max_documents=20}]"
    place = sets("data.folder=tokens/new", "tokenizer.folder=tokens/new-tokenizer")
    settings = [*place, *sets("data.held_out=0.0", sources)]
    done = run("base.toml", "--run", "runs/new", "--dry-run", *settings, folder=folder)
    files = (folder / "corpus").glob("*.txt")
    expected = sum(file.stat().st_size for file in files) + len("and one more")
    assert f"text {expected:,} bytes in " in " ".join(done.err.split())


def test_a_checkpoint_without_its_trainer_is_not_replaced(folder: Path) -> None:
    checkpoint = folder / "runs" / "base" / "checkpoints" / "step-2"
    shutil.rmtree(checkpoint / "trainer")
    before = tree(checkpoint)
    for dry in ([], ["--dry-run"]):
        done = run("base.toml", *dry, folder=folder)
        assert done.code == 2
        assert "step-2: a checkpoint without the trainer's state" in done.err
        assert 'init_from = "runs/base/checkpoints/step-2"' in done.err
        assert "--fresh" in done.err
    assert tree(checkpoint) == before
    done = run("base.toml", "--fresh", folder=folder)
    assert not done.code, done.err
    assert tree(folder / "runs" / "base.old-1" / "checkpoints" / "step-2") == before


def test_a_later_checkpoint_without_its_trainer_is_not_passed_over(folder: Path) -> None:
    checkpoints = folder / "runs" / "base" / "checkpoints"
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-9")
    shutil.rmtree(checkpoints / "step-9" / "trainer")
    done = run("base.toml", folder=folder)
    assert done.code == 2
    assert "step-9: a checkpoint without" in done.err
    assert "remove it to continue from runs/base/checkpoints/step-2" in done.err


def test_tiny_is_the_bundled_tokenizer_in_a_recipe_too(folder: Path) -> None:
    """Nothing is trained for it; `./tiny` is a folder as any other."""
    tiny = sets("tokenizer.folder='tiny'", "model.vocab_size=3072", "data.folder='tokens/tiny'")
    done = run("base.toml", "--run", "runs/t", *tiny, folder=folder)
    assert not done.code, done.err
    assert not (folder / "tiny").exists()
    manifest = folder / "tokens" / "tiny" / "corpus" / "train" / "manifest.json"
    assert json.loads(manifest.read_text())["vocab_size"] == 3072
    own = sets("tokenizer.folder='./tiny'", "data.folder='tokens/own'")
    done = run("base.toml", "--run", "runs/o", *own, folder=folder)
    assert not done.code, done.err
    manifest = folder / "tokens" / "own" / "corpus" / "train" / "manifest.json"
    assert json.loads(manifest.read_text())["vocab_size"] < 500
    # A checkpoint in a folder of that name is a folder too.
    shutil.copytree(folder / "runs" / "base" / "checkpoints" / "step-2", folder / "tiny-2")
    shutil.rmtree(folder / "tiny")
    (folder / "tiny-2").rename(folder / "tiny")
    done = run("sft.toml", *sets("init_from='./tiny'"), folder=folder)
    assert not done.code, done.err
    manifest = folder / "tokens" / "sft" / "talk.jsonl" / "train" / "manifest.json"
    assert json.loads(manifest.read_text())["vocab_size"] < 500


def other_tokenizer(folder: Path) -> None:
    train_tokenizer(["other words are these " * 9] * 3, 400).save(folder / "other")


DRY: dict[str, tuple[str, list[str], str]] = {
    "no such path": ("base", ["data.sources=[{path='none.txt'}]"], "none.txt: no such file"),
    "not UTF-8": ("base", ["data.sources=[{path='latin.txt'}]"], "latin.txt: is not UTF-8"),
    "no such generator": (
        "base",
        ["data.sources=[{name='generated:storys',max_documents=3}]"],
        "no such generator",
    ),
    "fewer rows than ids": ("base", ["model.vocab_size=300"], "more ids than the model has rows"),
    "another size": ("sft", ["model.hidden_size=64"], "hidden_size 32 -> 64"),
    "another depth": (
        "sft",
        ["model.num_nextn_predict_layers=2"],
        "num_nextn_predict_layers 1 -> 2",
    ),
    "another tokenizer": ("sft", ["tokenizer.folder='other'"], "trained with another tokenizer"),
    "nothing in it": ("base", ["data.sources=[{path='empty.txt'}]"], "nothing to learn"),
    "mtp of nothing": (
        "base",
        ["model.num_nextn_predict_layers=0", "mtp.weight=0.2"],
        "[mtp] has no effect",
    ),
    "experts of nothing": (
        "base",
        [
            "model.first_k_dense_replace=2",
            "model.num_nextn_predict_layers=0",
            "balance.sequence_alpha=0.2",
        ],
        "[balance] has no effect",
    ),
}


@pytest.mark.parametrize("fault", DRY)
def test_a_dry_run_finds_what_the_run_would_refuse(folder: Path, fault: str) -> None:
    name, overrides, message = DRY[fault]
    other_tokenizer(folder)
    (folder / "latin.txt").write_bytes("Wal und Möwe".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    before = tree(folder)
    where = ("--run", "runs/new", *sets(*overrides))
    for dry in (["--dry-run"], []):
        done = run(f"{name}.toml", *dry, *where, folder=folder)
        assert done.code == 2, done.err
        assert message in done.err
        if dry:
            assert tree(folder) == before
    after = tree(folder)
    assert {name: after[name] for name in before} == before


IDLE: dict[str, tuple[str, list[str], str]] = {
    "documents apart": ("sft", ["training.isolate_documents=false"], "training.isolate_documents"),
    "long ones": (
        "base",
        ["training.long_conversations='refuse'"],
        "training.long_conversations has no effect: stage 'pretrain'",
    ),
    "nothing held out": (
        "base",
        ["data.held_out=0.0", "validation.every_tokens=64"],
        "validation.every_tokens has no effect: nothing is held out",
    ),
    "a licence": (
        "base",
        ["data.sources=[{name='wordnet',licence='mine'}]"],
        "licence of wordnet has no effect",
    ),
}


@pytest.mark.parametrize("fault", IDLE)
def test_a_key_that_would_do_nothing_is_named(folder: Path, fault: str) -> None:
    name, overrides, message = IDLE[fault]
    done = run(f"{name}.toml", "--dry-run", *sets(*overrides), folder=folder)
    assert done.code == 2
    assert message in done.err


def test_a_recipe_that_a_run_wrote_is_one(folder: Path) -> None:
    """Its keys are all there, with their defaults."""
    done = run("sft.toml", folder=folder)
    assert not done.code, done.err
    for name in ("base", "sft"):
        done = run(f"runs/{name}/recipe.toml", "--dry-run", folder=folder)
        assert not done.code, done.err


@pytest.mark.slow
def test_what_a_run_is_otherwise_than_its_recipe_sounds_is_said(folder: Path) -> None:
    """At the start and in the plan, in the same words."""
    extra = sets("tokenizer.vocab_size=600", "training.threads=1000", "data.folder='tokens/n'")
    new = sets("tokenizer.folder='tokens/new'")
    done = run("base.toml", "--run", "runs/n", *extra, *new, folder=folder)
    assert not done.code, done.err
    ids = json.loads((folder / "tokens/n/corpus/train/manifest.json").read_text())["vocab_size"]
    assert f"tokenizer tokens/new: {ids} ids of the 600 asked for" in done.err
    assert f"500 rows for the tokenizer's {ids} ids: {500 - ids} are never used" in done.err
    assert "training.threads = 1000 on " in done.err
    there = sets("tokenizer.vocab_size=600", "tokenizer.merge_digits=false")
    done = run("base.toml", "--run", "runs/m", *there, "--dry-run", folder=folder)
    assert "the token shards are to be built with the tokenizer tokens/tokenizer" in done.err
    first = run("base.toml", "--run", "runs/m", *there, folder=folder)
    plan = run("base.toml", "--run", "runs/k", *there, "--dry-run", folder=folder)
    for done in (first, plan):
        assert "so [tokenizer] vocab_size = 600, merge_digits = false does not count" in done.err
        assert "passes over each source: corpus " in done.err


def test_passes_are_counted_by_source(folder: Path) -> None:
    """In closed form: 64 tokens are 4 samples; a pass has one of `few` and, at half an epoch, two
    of the four of `more`."""
    (folder / "few.txt").write_text("the whale\n")
    ids = "the whale swims under cold water and sings low songs to a far shore "
    (folder / "more.txt").write_text(ids * 3)
    sources = "data.sources=[{path='few.txt'},{path='more.txt',epochs=0.5}]"
    other = sets(sources, "data.held_out=0.0", "data.folder='tokens/p'", "data.fim_rate=0.0")
    done = run("base.toml", "--run", "runs/p", *other, folder=folder)
    assert not done.code, done.err
    manifest = json.loads((folder / "tokens/p/more.txt/train/manifest.json").read_text())
    samples = -(-(manifest["num_tokens"] - 1) // LENGTH)
    taken = round(0.5 * samples)
    passes = 4 / (1 + taken)
    expected = f"few.txt {passes:.3g}, more.txt {passes * taken / samples:.3g}"
    assert f"passes over each source: {expected}" in done.err


@pytest.mark.parametrize(
    ("passes", "text"),
    [(1234.5, "1,234"), (999.6, "1,000"), (12.345, "12.3"), (0.5, "0.5"), (1e-6, "< 0.0001")],
)
def test_passes_are_no_powers_of_ten(passes: float, text: str) -> None:
    assert _count(passes) == text


def test_no_validation_is_said(folder: Path) -> None:
    done = run("base.toml", "--run", "runs/v", *sets("data.held_out=0.0", "data.folder='tokens/v'"),
               folder=folder)  # fmt: skip
    assert "no validation: nothing is held out" in done.err
    long = {
        "messages": [
            {"role": "user", "content": "swim " * 90},
            {"role": "assistant", "content": "x"},
        ]
    }
    (folder / "talk.jsonl").write_text("\n".join(json.dumps(long | {"n": n}) for n in range(2)))
    sources = "data.sources=[{path='talk2.jsonl',held_out=0.0},{path='talk.jsonl'}]"
    (folder / "talk2.jsonl").write_text(conversations(*"abcdefghij"))
    rows = [
        dict(long, messages=[*long["messages"], {"role": "user", "content": str(n)}])
        for n in range(4)
    ]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("sft.toml", *sets(sources), folder=folder)
    assert not done.code, done.err
    assert "held-out documents fits a sample with a target" in done.err
    kinds = [record["kind"] for record in read_metrics(folder / "runs/sft/metrics.jsonl")]
    assert "validation" not in kinds


@pytest.mark.parametrize("key", ["fim_rate", "split_punctuation_rate"])
def test_rates_of_texts_without_a_text_are_said(folder: Path, key: str) -> None:
    line = f"data.{key} = 0.5 has no effect"
    done = run("sft.toml", *sets(f"data.{key}=0.5"), folder=folder)
    assert not done.code, done.err
    assert line in done.err
    done = run("sft.toml", *sets(f"data.{key}=0.5"), "--dry-run", folder=folder)
    assert line in done.err
    done = run("base.toml", "--run", "runs/r", *sets(f"data.{key}=0.5"), folder=folder)
    assert line not in done.err


def test_a_total_below_what_is_trained_says_that_nothing_is(folder: Path) -> None:
    shorter = sets("training.total_tokens=40")
    done = run("base.toml", *shorter, "--allow-changes", folder=folder)
    assert not done.code, done.err
    assert "nothing to train: training.total_tokens is 40" in done.err


def test_a_failed_first_step_has_advice_that_can_be_followed(folder: Path) -> None:
    rates = sets(*(f"lr_schedule.{key}=1e30" for key in ("peak", "low", "final")))
    longer = sets("training.total_tokens=640")
    done = run("base.toml", "--run", "runs/x", *rates, *longer, folder=folder)
    assert done.code == 2
    assert "none yet" not in done.err
    assert "begin anew: there is no checkpoint yet" in done.err


FLOATS: dict[str, Any] = {
    "lr_schedule.peak": "inf", "optimizer.eps": "nan", "mtp.weight": "inf",
    "balance.sequence_alpha": "nan", "checkpoint.every_minutes": "inf", "data.held_out": "nan",
    "model.rope_theta": "inf",
}  # fmt: skip


@pytest.mark.parametrize("key", FLOATS)
def test_what_is_no_number_is_refused(folder: Path, key: str) -> None:
    done = run("base.toml", "--dry-run", *sets(f"{key}={FLOATS[key]}"), folder=folder)
    assert done.code == 2
    assert "finite number" in done.err
    assert key.partition(".")[2] in done.err
