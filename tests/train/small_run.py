"""A training run of seconds, as fixtures use it and as a program that can be killed.

    python small_run.py RUN_FOLDER WHERE STEP

kills itself with SIGKILL at step STEP: `update` between the weights' and the router bias's update,
`save` in the middle of that step's checkpoint; `held` waits in its first step for a line of input,
before which its parent sends a signal.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from rorqual.data import Batch
from rorqual.model import DeepseekV3, build
from rorqual.train import TrainingData, train
from rorqual.train.recipe import recipe_of
from rorqual.train.stages import Pretrain, Sft

STAGES = (Pretrain, Sft)

VOCAB, LENGTH = 64, 16
MODEL = {
    "preset": "tiny",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}
RECIPE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": MODEL,
    "tokenizer": {"folder": "tokenizer"},
    "data": {"folder": "tokens", "sources": [{"path": "text.txt"}]},
    "training": {"total_tokens": 8 * 8 * LENGTH, "sequence_length": LENGTH, "micro_batch_size": 4},
    "batch_ramp": {"start": 8, "end": 8},
    "lr_schedule": {"peak": 3e-3, "low": 3e-4, "final": 1e-4, "warmup": 0.2},
    "checkpoint": {"every_tokens": 2 * 8 * LENGTH, "keep_last": 2},
}


class SyntheticBatches:
    """Sample i is a function of i alone: an arithmetic sequence of ids, in one document."""

    def __init__(self, num_depths: int = 1, is_isolated: bool = False) -> None:
        self.width = LENGTH + 1 + num_depths
        self.is_isolated = is_isolated

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        share = num_samples // world
        first = counter + rank * share
        rows = [self.sample(index) for index in range(first, first + share)]
        tokens_BS = torch.stack(rows)
        documents_BS = torch.ones_like(tokens_BS) if self.is_isolated else None
        return Batch(tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool), documents_BS)

    def sample(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        first, stride = torch.randint(0, VOCAB, (2,), generator=generator).tolist()
        return (first + stride % 5 * torch.arange(self.width)) % VOCAB


def small_model(**changes: Any) -> DeepseekV3:
    """The model of RECIPE with changed fields, in training mode."""
    recipe = recipe_of({**RECIPE, "model": {**MODEL, **changes}}, STAGES)
    return build(recipe.model_config(), seed=1).train()


def _kill_at(where: str, step: int) -> None:
    from rorqual.train import router_bias, saver

    calls = 0
    target: Any = router_bias if where == "update" else saver
    name = "update_bias" if where == "update" else "save_file"
    original = getattr(target, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(target, name, counted)


class HeldBatches(SyntheticBatches):
    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        if counter == 0:
            print("batch 0", flush=True)
            sys.stdin.readline()  # a signal that comes first is handled before this returns
        return super().batch(counter, num_samples)


def main() -> None:
    run_folder, where, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    is_held = where == "held"
    if not is_held:
        _kill_at(where, step)
    batches = HeldBatches() if is_held else SyntheticBatches()
    summary = train(recipe_of(RECIPE, STAGES), run_folder, TrainingData(train=batches))
    ended = f"finished {summary.is_finished} step {summary.step} signal {summary.signal}"
    print(ended, flush=True)


if __name__ == "__main__":
    main()
