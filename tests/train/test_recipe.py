"""Recipes: what is wrong is named by key; a written recipe reads back as the same one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import RECIPE, STAGES

from rorqual.cli.stages import stages
from rorqual.data import Isolation
from rorqual.errors import ConfigError
from rorqual.tokenizer import load_tokenizer
from rorqual.train import Recipe, load_recipe
from rorqual.train.recipe import toml_text
from rorqual.train.stages.corpora import CorporaStage

RECIPES = Path(__file__).parents[2] / "recipes"
SFT = ("stage='sft'", "init_from='x'", "model={}")

BROKEN = {
    "an unknown key": ("training.sequence_lenght=4", "did you mean 'sequence_length'"),
    "threads that no machine has": ("training.threads=100000", "training.threads: "),
    "an unknown section": ("trainig.threads=4", "did you mean 'training'"),
    "a wrong type": ("training.total_tokens='many'", r"training\.total_tokens: .*'many'"),
    "zero tokens": ("training.total_tokens=0", r"training\.total_tokens"),
    "an unknown stage": ("stage='rl'", "stage: .*'pretrain' or 'sft'"),
    "an unknown precision": ("training.precision='fp4'", r"training\.precision"),
    "a ramp off the micro-batch": ("batch_ramp.start=6", r"batch_ramp\.start 6 is not a multiple"),
    "overlapping phases": ("lr_schedule.warmup=0.9", "phases overlap"),
    "rates in disorder": ("lr_schedule.low=1.0", "peak 0.003 >= low 1.0"),
    "a share above one": ("lr_schedule.warmup=1.5", "warmup 1.5 is neither a share"),
    "a negative moment": ("mtp.weight_until=-1", "weight_until -1 is neither"),
    "a negative alpha": ("balance.sequence_alpha=-1", r"balance\.sequence_alpha"),
    "sft from nothing": ("stage='sft'", "'sft' needs init_from"),
    "preset and checkpoint": ("init_from='x'", "exclude each other"),
    "an unknown preset": ("model.preset='huge'", "there is no preset 'huge'"),
    "an unknown model field": ("model.hiden_size=4", "did you mean 'hidden_size'"),
    "a sequence too long": ("training.sequence_length=65", "exceeds model.max_position_embeddings"),
    "fewer tokens than a batch": ("training.total_tokens=20", "less than one batch"),
    "a name that is a path": ("name='../x'", "name: "),
    "no checkpoint kept": ("checkpoint.keep_last=0", r"checkpoint\.keep_last"),
    "an unknown way with long ones": (
        "training.long_conversations='drop'",
        r"training\.long_conversations: .*'split' or 'refuse'",
    ),
    "unknown moments": ("optimizer.moments='int8'", r"optimizer\.moments"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(toml_text(RECIPE))
    return path


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_recipes_name_the_key(file: Path, fault: str) -> None:
    override, message = BROKEN[fault]
    with pytest.raises(ConfigError, match=message):
        load_recipe(file, STAGES, [override])


def test_a_preset_or_a_checkpoint_is_needed(file: Path) -> None:
    file.write_text(file.read_text().replace('preset = "tiny"', ""))
    with pytest.raises(ConfigError, match=r"model\.preset is missing"):
        load_recipe(file, STAGES)


@pytest.mark.parametrize("text", ["name = ", "name = 'a'\nname = 'b'", "\xff"])
def test_what_is_no_toml_names_the_file(file: Path, text: str) -> None:
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"recipe\.toml: is not valid TOML"):
        load_recipe(file, STAGES)


def test_written_recipe_reads_back(file: Path) -> None:
    recipe = load_recipe(file, STAGES, ["training.threads=1", 'init_from="a \\"b\\""', "model={}"])
    file.write_text(toml_text(recipe.table()))
    again = load_recipe(file, STAGES)
    assert again == recipe


def test_isolation_is_the_stages_or_the_recipes(make_recipe: Callable[..., Recipe]) -> None:
    """§4.1: pre-training does not isolate; §5.1: supervised samples are isolated."""
    assert not make_recipe().is_isolated
    assert make_recipe("training.isolate_documents=true").is_isolated
    assert make_recipe(*SFT).is_isolated


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ((), None),
        (("training.isolate_documents=true",), {"is_whole": False, "splits_long": True}),
        (SFT, {"is_whole": True, "splits_long": True}),
        ((*SFT, "training.long_conversations='refuse'"), {"is_whole": True, "splits_long": False}),
    ],
)
def test_documents_are_kept_apart_as_the_stage_packs_them(
    make_recipe: Callable[..., Recipe], changes: tuple[str, ...], form: dict[str, bool] | None
) -> None:
    """Texts stay cut at fixed places (§4.1) where they are isolated too."""
    tokenizer = load_tokenizer("tiny")
    ids = (tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_id)
    assert len(set(ids)) == 3
    recipe = make_recipe(*changes)
    assert isinstance(recipe, CorporaStage)
    assert recipe.isolation(tokenizer) == (None if form is None else Isolation(*ids, **form))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path, stages()).name == path.stem


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_of_overrides_say_so_and_what_helps(file: Path, fault: str) -> None:
    """Not the file's, in which the value does not stand."""
    override, _ = BROKEN[fault]
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, STAGES, [override])
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{file} --set {override}")
    assert "the file" not in first
    assert any(line.startswith("  fix: ") for line in rest)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("training.seed='x'", ("training.seed='x'",)),
        ("training={}", ("training.sequence_length=16", "training={}")),
        ("nonsense=1", ("nonsense=1",)),
    ],
)
def test_an_override_that_is_fine_is_not_blamed(
    file: Path, broken: str, said: tuple[str, ...]
) -> None:
    overrides = ("training.sequence_length=16", "checkpoint.keep_last=2", broken)
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, STAGES, overrides)
    assert caught.value.where == " ".join([str(file), *(f"--set {text}" for text in said)])


def test_a_fault_of_the_file_is_the_files(file: Path) -> None:
    file.write_text(file.read_text() + "\n[nonsense]\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, STAGES, ["training.threads=1"])
    assert caught.value.where == str(file)


def test_less_than_a_batch_says_how_much_a_batch_is(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"20 is less than one batch: .* 8 times .* 16 is 128"):
        load_recipe(file, STAGES, ["training.total_tokens=20"])


def test_what_is_missing_is_said_at_once(tmp_path: Path) -> None:
    """A missing section with the keys that it needs, beside all else that is missing."""
    path = tmp_path / "bare.toml"
    path.write_text('[model]\npreset = "tiny"\n[data]\nsources = [{name = "wordnet"}]\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, STAGES)
    assert set(caught.value.what.split("; ")) == {
        "missing key 'name'",
        "missing key 'data.folder'",
        "missing section [training] with total_tokens, sequence_length, micro_batch_size",
        "missing section [batch_ramp] with start, end",
    }
    assert caught.value.fix == "add what is missing (every key: `rorqual train --keys`)"


def test_an_override_into_a_value_or_a_list_says_where_it_cannot_go(file: Path) -> None:
    for override in ("seed.x=1", "data.sources.epochs=2"):
        with pytest.raises(ConfigError, match="is not a section") as caught:
            load_recipe(file, STAGES, [override])
        assert caught.value.fix is not None
