"""A stage is one class: one that is made up here trains, resumes and is told apart.

Oracles: the run that nothing interrupted; the loss as the sum of its recorded parts; the reward
computed anew from the model's own logits.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from small_run import LENGTH, MODEL, RECIPE, STAGES, SyntheticBatches
from torch import Tensor

import in_process
import rorqual.train
from rorqual.config import settings
from rorqual.data import Advance, Batch, Generator, Inputs, silent
from rorqual.errors import ConfigError, TrainingError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.train import Recipe, TrainingData, load_recipe, train
from rorqual.train.batches import Batches, Preparation, TokenLosses
from rorqual.train.changes import check_changes
from rorqual.train.loss import LossParts, TrainingModel
from rorqual.train.metrics import read_metrics
from rorqual.train.preflight import look_ahead, preview
from rorqual.train.prepare import prepare
from rorqual.train.recipe import recipe_of, toml_text
from rorqual.train.stages import Pretrain
from rorqual.train.start import start_model

FLOAT32 = 1e-5
WHERE = Path("runs/made/checkpoints/step-4")


def reward_of(model: DeepseekV3, tokens_BS: Tensor) -> Tensor:
    """(B,): how likely the model holds the second token of each sample."""
    with torch.no_grad():
        logits_BV = model(tokens_BS[:, :1])[:, -1]
    return logits_BV.softmax(-1).gather(1, tokens_BS[:, 1:2])[:, 0]


class Judged:
    """Samples with a reward from the model that is being trained."""

    def __init__(self, batches: Batches, model: DeepseekV3) -> None:
        self.batches, self.model = batches, model

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        batch = self.batches.batch(counter, num_samples)
        extras = {"reward_B": reward_of(self.model, batch.tokens_BS) / num_samples}
        return Batch(batch.tokens_BS, batch.mask_BS, extras=extras)


class Surprised(TrainingModel):
    """The usual loss, and one on what is rewarded."""

    metric_names = ("reward", "own_loss")

    def __init__(self, model: DeepseekV3, weight: float) -> None:
        super().__init__(model)
        self.weight = weight

    def forward(
        self, x_BTD: Tensor | None = None, *, reward_B: Tensor | None = None, **given: Any
    ) -> LossParts | Tensor:
        parts = super().forward(x_BTD, **given)
        assert isinstance(parts, LossParts)
        assert reward_B is not None
        logits_BV = self.model(given["tokens_BS"][:, :1])[:, -1]
        own_loss = self.weight * (reward_B * logits_BV.logsumexp(-1) ** 2).sum()
        return LossParts(
            parts.total + own_loss,
            parts.cross_entropy_C,
            torch.stack([reward_B.sum(), own_loss.detach()]),
        )


@dataclass(frozen=True)
class Accuracy:
    share: float

    def record(self) -> dict[str, float | int]:
        return {"accuracy": self.share}

    def __str__(self) -> str:
        return f"{self.share:.1%} are right"


class Exam:
    def measure(self, model: DeepseekV3, losses: TokenLosses | None = None) -> Accuracy:
        return Accuracy(0.25)


@settings
class Taste:
    weight: float = 0.5
    note: str = ""
    judge: str = "itself"


@dataclass(frozen=True)
class Ready:
    """A preparation of which nothing is left to do."""

    data: TrainingData

    def check(self) -> None:
        pass

    def inputs(self) -> Inputs | None:
        return self.data.inputs

    def find(self, advance: Advance = silent) -> TrainingData | None:
        return self.data

    def make(self, advance: Advance = silent) -> TrainingData:
        return self.data

    def rows(self, data: TrainingData | None) -> list[tuple[str, str]]:
        return []

    def task(self) -> str:
        return "nothing is left to prepare"


@settings
class Made(Recipe):
    """Nothing of it is on a disk: no corpora, no tokenizer."""

    harmless: ClassVar[tuple[str, ...]] = ("taste.note",)
    on_request: ClassVar[tuple[str, ...]] = ("taste.weight",)

    stage: Literal["made"] = "made"
    taste: Taste = field(default_factory=Taste)

    def preparation(self, config: ModelConfig, generators: Mapping[str, Generator]) -> Preparation:
        return Ready(TrainingData(train=SOURCE, held_out=Exam(), notes=("made from nothing",)))

    def batches(self, data: TrainingData, model: DeepseekV3) -> Batches:
        return Judged(data.train, model)

    def root(self, model: DeepseekV3) -> Surprised:
        return Surprised(model, self.taste.weight)


class Stoppable(SyntheticBatches):
    """Sends SIGTERM to its own process in a step, if it is told in which."""

    stop_at: int | None = None

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        if counter == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(counter, num_samples)


SOURCE = Stoppable()
KNOWN = (*STAGES, Made)
TABLE: dict[str, Any] = {
    **{key: RECIPE[key] for key in ("seed", "batch_ramp", "lr_schedule")},
    # Runs are compared bit for bit.
    "training": RECIPE["training"] | {"threads": 1},
    "name": "made",
    "stage": "made",
    "model": MODEL,
    "taste": {"weight": 0.25},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "made.toml"
    path.write_text(toml_text(TABLE))
    return path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs know the stage too."""
    monkeypatch.setattr("rorqual.cli.stages.stages", lambda: KNOWN)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("made") / "run"
    recipe = recipe_of(TABLE, KNOWN)
    train(recipe, folder, prepare(recipe), is_quiet=True)
    return folder


def steps_of(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "metrics.jsonl")
    return [record for record in records if record["kind"] == "step"]


def test_its_own_loss_and_figures_are_recorded(made: Path) -> None:
    steps = steps_of(made)
    assert len(steps) == 8
    for step in steps:
        parts = step["main"] + step["mtp_weight"] * step["mtp"][0] + step["balance"]
        assert step["loss"] == pytest.approx(parts + step["metrics"]["own_loss"], rel=FLOAT32)
    recipe = recipe_of(TABLE, KNOWN)
    model = start_model(recipe, None)
    tokens_BS = SOURCE.batch(0, 8).tokens_BS
    reward_B = reward_of(model, tokens_BS)
    with torch.no_grad():
        squares_B = model(tokens_BS[:, :1])[:, -1].logsumexp(-1) ** 2
    first = steps[0]["metrics"]
    assert first["reward"] == pytest.approx(float(reward_B.mean()), rel=FLOAT32)
    own = 0.25 * float((reward_B * squares_B).mean())
    assert first["own_loss"] == pytest.approx(own, rel=FLOAT32)
    assert steps[-1]["metrics"]["reward"] != first["reward"]


def test_it_is_measured_and_drawn_by_its_own_figures(made: Path) -> None:
    (check,) = [r for r in read_metrics(made / "metrics.jsonl") if r["kind"] == "validation"]
    assert check == {"kind": "validation", "step": 8, "tokens": 1024, "accuracy": 0.25}
    drawn = {path.stem for path in (made / "plots").iterdir()}
    assert {"metric_reward", "metric_own_loss", "loss"} <= drawn


def test_a_run_that_was_stopped_equals_one_that_was_not(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(TABLE, KNOWN)
    monkeypatch.setattr(SOURCE, "stop_at", 3 * 8)
    stopped = train(recipe, tmp_path / "run", prepare(recipe), is_quiet=True)
    assert (stopped.step, stopped.is_finished) == (4, False)
    monkeypatch.setattr(SOURCE, "stop_at", None)
    ended = train(recipe, tmp_path / "run", prepare(recipe), is_quiet=True)
    assert ended.is_finished
    for name in ("model.safetensors", "trainer/moments.safetensors"):
        one = load_file(ended.checkpoint / name)
        other = load_file(made / "checkpoints" / "step-8" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [s["metrics"] for s in steps_of(tmp_path / "run")] == [
        s["metrics"] for s in steps_of(made)
    ]


def test_what_a_loss_is_given_besides_has_a_row_for_each_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(TABLE, KNOWN)
    for rewards in (torch.ones(4), torch.ones(())):
        monkeypatch.setattr(f"{__name__}.reward_of", lambda *_, rewards=rewards: rewards)
        with pytest.raises(TrainingError, match="do not fit the recipe") as caught:
            train(recipe, tmp_path / "run", prepare(recipe), is_quiet=True)
        assert caught.value.found == "reward_B without a row for each sample"


@pytest.mark.usefixtures("known")
def test_the_verb_trains_it_as_any_other(file: Path) -> None:
    done = in_process.run("train", file.name, "--dry-run", folder=file.parent)
    assert not done.code, done.err
    assert "stage" in done.err
    assert "made from nothing" in done.err
    assert not (file.parent / "runs").exists()
    short = ("--set", f"training.total_tokens={2 * 8 * LENGTH}")
    done = in_process.run("train", file.name, *short, folder=file.parent)
    assert not done.code, done.err
    assert done.out.strip() == "runs/made/checkpoints/step-2"
    for said in ("made from nothing", "reward 0.", "step 2: 25.0% are right"):
        assert said in done.err
    again = in_process.run("train", file.name, "--dry-run", *short, folder=file.parent)
    assert "step-2 has 256 tokens already" in " ".join(again.err.split())
    other = in_process.run(
        "train", file.name, *short, "--set", "taste.judge=me", folder=file.parent
    )
    assert other.code == 2
    assert "another recipe; different: taste.judge: itself -> me" in other.err
    anew = in_process.run("train", file.name, *short, "--fresh", folder=file.parent)
    assert "the old run is now runs/made.old-1" in anew.err


@pytest.mark.usefixtures("known")
def test_a_recipe_without_text_has_no_bits_per_byte(file: Path) -> None:
    done = in_process.run(
        "eval", "tiny", "--skills", "0", "--recipe", file.name, folder=file.parent
    )
    assert done.code == 2
    assert "bits per byte need real text" in done.err


@pytest.mark.parametrize("verb", [("train",), ("eval", "tiny", "--skills", "0", "--recipe")])
def test_a_verb_that_does_not_know_it_lists_those_it_knows(file: Path, verb: tuple[str]) -> None:
    done = in_process.run(*verb, file.name, folder=file.parent)
    assert done.code == 2
    assert "stage: should be 'pretrain' or 'sft' (found 'made')" in done.err


FOREIGN = {
    "a section": (
        {**RECIPE, "taste": {}},
        "'taste': it is of stage 'made', and this recipe is of 'pretrain'",
    ),
    "data": (
        {**TABLE, "data": {}},
        "'data': it is of stage 'pretrain' or 'sft', and this recipe is of 'made'",
    ),
    "a key of a section": (
        {**TABLE, "training": {**TABLE["training"], "isolate_documents": True}},
        "'training.isolate_documents': it is of stage 'pretrain' or 'sft', and",
    ),
    "a key of none": ({**TABLE, "tasty": {}}, "'tasty'; did you mean 'taste'?"),
    "a stage that is no text": ({**TABLE, "stage": 3}, "stage: should be .* or 'made' .found 3."),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_a_key_of_another_stage_says_so(fault: str) -> None:
    table, said = FOREIGN[fault]
    with pytest.raises(ConfigError, match=said):
        recipe_of(table, KNOWN)


def test_a_recipe_that_names_no_stage_is_of_the_first() -> None:
    bare = {key: value for key, value in TABLE.items() if key not in ("stage", "taste")}
    assert type(recipe_of(bare, (Made, Pretrain))) is Made
    assert type(recipe_of(RECIPE, KNOWN)) is Pretrain


def test_its_recipe_reads_back(file: Path) -> None:
    recipe = load_recipe(file, KNOWN)
    assert list(recipe.table())[5:8] == ["tokenizer", "taste", "training"]
    file.write_text(toml_text(recipe.table()))
    assert load_recipe(file, KNOWN) == recipe


def test_its_keys_are_what_it_says_on_a_resume() -> None:
    def changed(**taste: Any) -> Recipe:
        return recipe_of({**TABLE, "taste": {**TABLE["taste"], **taste}}, KNOWN)

    stored = recipe_of(TABLE, KNOWN).table()
    assert check_changes(stored, changed(note="x"), 512, where=WHERE) == []
    with pytest.raises(TrainingError, match="--allow-changes"):
        check_changes(stored, changed(weight=0.5), 512, where=WHERE)
    for is_asked in (False, True):
        with pytest.raises(TrainingError, match="another recipe; different: taste"):
            check_changes(stored, changed(judge="me"), 512, where=WHERE, is_asked=is_asked)


def test_a_checkpoint_names_its_stage(made: Path, make_recipe: Callable[..., Recipe]) -> None:
    """Another stage may begin with its weights, never go on with its run."""
    for attempt in (look_ahead, preview):
        with pytest.raises(TrainingError, match="of another stage") as caught:
            attempt(make_recipe(), made)
        assert caught.value.found == "a checkpoint of stage 'made', a recipe of stage 'pretrain'"
        assert "init_from" in str(caught.value.fix)


def test_inspect_says_what_a_checkpoint_was_trained_as(made: Path, tmp_path: Path) -> None:
    done = in_process.run("inspect", made, "--json")
    assert not done.code, done.err
    trained = {"stage": "made", "step": 8, "tokens": 1024}
    assert json.loads(done.out)["trained"] == trained
    assert "stage made, step 8, 1,024 tokens\n" in in_process.run("inspect", made).out
    broken = shutil.copytree(made / "checkpoints" / "step-8", tmp_path / "broken")
    for text in ("{}", "{", '{"recipe": {"stage": "x"}, "progress": {"step": "y", "tokens": 1}}'):
        (broken / "trainer" / "state.json").write_text(text)
        done = in_process.run("inspect", broken, "--json")
        assert done.code == 2
        failed = [c for c in json.loads(done.out)["checks"] if c["status"] == "failed"]
        assert [check["name"] for check in failed] == ["training"]
        assert "state.json" in failed[0]["detail"]
    shutil.rmtree(broken / "trainer")
    assert "trained" not in json.loads(in_process.run("inspect", broken, "--json").out)


def test_what_prepares_prints_nothing() -> None:
    """The loop's report is all that `train/` says to people; commands say the rest."""
    speakers = set()
    for path in Path(rorqual.train.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id in ("console", "output_console", "print"):
                speakers.add(path.name)
    assert speakers == {"report.py"}


def test_the_loop_and_what_is_before_it_know_no_stage_by_name() -> None:
    for path in Path(rorqual.train.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.Constant) and node.value in ("pretrain", "sft")), path
