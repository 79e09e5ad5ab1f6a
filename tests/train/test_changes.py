"""What a resume may change. Oracle: the schedule's own functions, and a list of every key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.errors import TrainingError
from rorqual.train import Recipe
from rorqual.train.changes import changes, check_changes

WHERE = Path("runs/small/checkpoints/step-4")
MakeRecipe = Callable[..., Recipe]

HARMLESS = [
    "name='other'", "checkpoint.keep_last=7", "checkpoint.every_minutes=3.0",
    "checkpoint.every_tokens=7", "validation.every_tokens=7", "validation.max_tokens=9",
    "training.threads=7", "training.compile=true", "training.activation_checkpointing=true",
    "metrics.load_every_tokens=64", "metrics.tensorboard=true",
    "parallel.pp=2", "parallel.ep=2", "parallel.dp_shard=2", "parallel.dp_replicate=2",
    "parallel.zero=3", "parallel.ranks_per_node=2", "parallel.timeout_seconds=9.0",
    "tokenizer.folder='moved'", "data.folder='moved'", "data.corpora='moved'",
    "ema.decay=0.5", "spikes.rollbacks=0", "spikes.window=9", "spikes.skip=2",
    "spikes.loss_deviations=9.0", "spikes.norm_deviations=9.0",
]  # fmt: skip
ON_REQUEST = [
    "training.total_tokens=2048", "training.micro_batch_size=2", "training.precision='bfloat16'",
    "training.isolate_documents=true", "batch_ramp.start=4", "batch_ramp.end=12",
    "batch_ramp.over=0.5", "batch_ramp.multiple_of=4",
    "optimizer.beta1=0.8", "optimizer.beta2=0.99",
    "optimizer.weight_decay=0.0", "optimizer.eps=1e-6", "optimizer.clip_norm=2.0",
    "lr_schedule.peak=4e-3", "lr_schedule.low=2e-4", "lr_schedule.final=2e-4",
    "lr_schedule.warmup=0.1", "lr_schedule.constant_until=0.5", "lr_schedule.cosine_until=0.9",
    "lr_schedule.low_until=0.98", "balance.bias_update_speed=0.0", "balance.bias_until=0.5",
    "balance.sequence_alpha=0.0", "mtp.weight=0.2", "mtp.weight_until=0.5", "mtp.weight_after=0.2",
    "training.deterministic=false",
]  # fmt: skip
REFUSED = [
    "seed=9", "init_from='x'", "stage='sft'", "model.q_lora_rank=4", "model.rope_theta=5000.0",
    "optimizer.moments='bfloat16'", "training.sequence_length=32",
    "training.long_conversations='refuse'", "tokenizer.vocab_size=300", "data.seed=4",
    "data.fim_rate=0.5", "data.held_out=0.5", "data.sources=[{path='other.txt'}]",
    "data.sources=[{path='text.txt', epochs=2.0}]",
]  # fmt: skip


def pair(make_recipe: MakeRecipe, override: str) -> tuple[Recipe, Recipe]:
    """(old, new): two recipes that differ in this key alone, where that can be."""
    if override.startswith("stage"):
        start = ["init_from='x'", "model={}"]
        return make_recipe(*start), make_recipe(override, *start)
    without_model = ["model={}"] if override.startswith("init_from") else []
    return make_recipe(), make_recipe(override, *without_model)


@pytest.mark.parametrize("override", HARMLESS)
def test_harmless_keys_may_differ(make_recipe: MakeRecipe, override: str) -> None:
    old, new = pair(make_recipe, override)
    assert changes(old, new)
    assert check_changes(old.table(), new, 512, where=WHERE) == []


@pytest.mark.parametrize("override", ON_REQUEST)
def test_what_moves_the_run_must_be_asked_for(make_recipe: MakeRecipe, override: str) -> None:
    old, new = pair(make_recipe, override)
    key = override.partition("=")[0]
    with pytest.raises(TrainingError, match=rf"(?s){key}: .* -> .*--allow-changes"):
        check_changes(old.table(), new, 512, where=WHERE)
    lines = check_changes(old.table(), new, 512, where=WHERE, is_asked=True)
    assert any(line.strip().startswith(f"{key}: ") for line in lines)


@pytest.mark.parametrize("override", REFUSED)
def test_what_makes_another_run_is_refused(make_recipe: MakeRecipe, override: str) -> None:
    old, new = pair(make_recipe, override)
    for is_asked in (False, True):
        with pytest.raises(TrainingError, match=override.partition("=")[0]) as caught:
            check_changes(old.table(), new, 512, where=WHERE, is_asked=is_asked)
        assert "another recipe" in str(caught.value)


def test_every_key_of_a_recipe_is_in_one_of_the_lists(make_recipe: MakeRecipe) -> None:
    """A new key must be thought about: it is refused until it is put here."""
    named = {o.partition("=")[0] for o in (*HARMLESS, *ON_REQUEST, *REFUSED)}
    # Of the same kind as one that is listed.
    named |= {"tokenizer.merge_digits", "tokenizer.train_bytes", "data.dedupe"}
    named |= {"data.split_punctuation_rate"}
    named |= {"parallel.order", "parallel.chunks", "parallel.timeline_step"}
    table = make_recipe().table()
    keys = {
        f"{section}.{key}" for section, part in table.items() if isinstance(part, dict)
        for key in part if section != "model"
    }  # fmt: skip
    keys |= {key for key, value in table.items() if not isinstance(value, dict)}
    assert keys - named == set()


def test_it_says_what_moves_in_figures(make_recipe: MakeRecipe) -> None:
    """In closed form: a run of 1,024 tokens at 800, of a schedule in shares, made twice as long."""
    old = make_recipe("balance.bias_until=0.75", "mtp.weight_until=0.75")
    new = make_recipe(
        "balance.bias_until=0.75", "mtp.weight_until=0.75", "training.total_tokens=2048"
    )
    before, after = old.lr_schedule.at(800, 1024), new.lr_schedule.at(800, 2048)
    assert before < after == 3e-3
    text = "\n".join(check_changes(old.table(), new, 800, where=WHERE, is_asked=True))
    assert "training.total_tokens: 1024 -> 2048" in text
    assert f"at 800 tokens: learning rate {before:.4g} -> 0.003" in text
    assert "MTP weight 0.1 -> 0.3" in text
    assert "router bias speed 0 -> 0.001" in text
    assert (
        f"cosine begins at {round(1024 * 10 / 14.8):,} -> {round(2048 * 10 / 14.8):,} tok" in text
    )
    assert "later MTP weight begins at 768 -> 1,536 tokens" in text
    assert "still router bias begins at 768 -> 1,536 tokens" in text
    assert "batch" not in text.replace("full batch", "")


def test_a_checkpoint_older_than_a_key_has_its_default(make_recipe: MakeRecipe) -> None:
    stored = make_recipe().table()
    del stored["training"]["isolate_documents"]
    assert check_changes(stored, make_recipe(), 0, where=WHERE) == []
    with pytest.raises(TrainingError, match="isolate_documents: False -> True"):
        check_changes(stored, make_recipe("training.isolate_documents=true"), 0, where=WHERE)
    stored["training"]["of_the_future"] = 1
    with pytest.raises(TrainingError, match=r"cannot be read: .*of_the_future"):
        check_changes(stored, make_recipe(), 0, where=WHERE)
