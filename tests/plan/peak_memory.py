"""How much memory a recipe's steps take, in a process of its own.

    python peak_memory.py RECIPE STEPS [key=value ...]

trains on random tokens and prints, in bytes, what the process had when all was imported, and the
most that it had from there on.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import torch

from rorqual.cli.stages import stages
from rorqual.model import build
from rorqual.train import Recipe, load_recipe
from rorqual.train.optimizer import AdamW
from rorqual.train.recompute import recompute
from rorqual.train.step import Stepper, StepValues

LITTLE = ("model.hidden_size=32", "model.vocab_size=64", "training.sequence_length=16")


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM`, of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def train(recipe: Recipe, num_steps: int, num_sequences: int) -> None:
    """Steps on random tokens, as the loop makes them."""
    config, training = recipe.model_config(), recipe.training
    model = build(config).train()
    optimizer = AdamW(model, recipe.optimizer)
    recompute(model, training.activation_checkpointing)
    stepper = Stepper(
        model,
        optimizer,
        micro_batch_size=training.micro_batch_size,
        precision=training.precision,
    )
    width = training.sequence_length + 1 + config.num_nextn_predict_layers
    for seed in range(num_steps):
        generator = torch.Generator().manual_seed(seed)
        shape = num_sequences, width
        tokens_BS = torch.randint(0, config.vocab_size, shape, generator=generator)
        mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        stepper.step(tokens_BS, mask_BS, StepValues(1e-4, 0.3, 1e-4, 1e-3))


def main() -> None:
    file, num_steps, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    # What libraries take when they are used first is none of the model's.
    little = load_recipe(file, stages(), [*overrides, *LITTLE])
    train(little, 1, little.training.micro_batch_size)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most is counted from here
    recipe = load_recipe(file, stages(), overrides)
    train(recipe, int(num_steps), recipe.batch_ramp.start)
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
