"""One sharded training step on two processes, for test_seams.py.

python two_ranks.py RANK STORE_FILE RESULT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_run import SyntheticBatches, small_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rorqual.config import fill
from rorqual.model import DeepseekV3
from rorqual.train.loss import TrainingModel
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.step import InTurn, Stepper, StepResult, StepValues

NUM_SAMPLES, MICRO_BATCH = 8, 2
VALUES = StepValues(lr=1e-2, mtp_weight=0.3, balance_alpha=0.01, bias_update_speed=0.01)


def make_model() -> DeepseekV3:
    return small_model(num_hidden_layers=3, tie_word_embeddings=False)


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, documents): two documents a sample, padding, targets that do not count."""
    tokens_BS = SyntheticBatches().batch(0, NUM_SAMPLES).tokens_BS
    mask_BS = torch.rand(tokens_BS.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    documents_BS = torch.ones_like(tokens_BS)
    documents_BS[:, 7:] = 2
    documents_BS[: NUM_SAMPLES // 2, 14:] = 0
    return tokens_BS, mask_BS & (documents_BS > 0), documents_BS


def stepper_of(model: DeepseekV3, **options: Any) -> Stepper:
    optimizer = AdamW(model, fill(OptimizerSettings, {"clip_norm": 0.5}))
    return Stepper(model, optimizer, micro_batch_size=MICRO_BATCH, **options)


def serial() -> tuple[StepResult, DeepseekV3]:
    model = make_model()
    tokens_BS, mask_BS, documents_BS = samples()
    return stepper_of(model).step(tokens_BS, mask_BS, VALUES, documents_BS), model


class Replicas:
    """Two ranks that shard the weights and share the samples."""

    num_replicas = 2

    def sum(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    def norm(self, own: Tensor) -> Tensor:
        assert isinstance(own, DTensor)
        return own.full_tensor()


def sharded(rank: int) -> dict[str, float]:
    """`fully_shard` on each layer and on the root; AdamW and the router bias too."""
    expected, whole = serial()
    model = make_model()
    root = TrainingModel(model)
    for layer in model.model.layers.values():
        fully_shard(layer)
    fully_shard(root)
    for module in root.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # coefficients are those of the whole batch
            module.set_force_sum_reduction_for_comms(True)
    stepper = stepper_of(model, accumulate=InTurn(model, root), ranks=Replicas())
    half = slice(rank * NUM_SAMPLES // 2, (rank + 1) * NUM_SAMPLES // 2)
    tokens_BS, mask_BS, documents_BS = samples()
    found = stepper.step(tokens_BS[half], mask_BS[half], VALUES, documents_BS[half])
    gaps = {
        name: abs(getattr(found, name) - getattr(expected, name))
        for name in ("loss", "main", "balance", "grad_norm", "num_targets")
    }
    gaps["mtp"] = abs(found.mtp[0] - expected.mtp[0])
    gaps["loads"] = float((found.loads_LE - expected.loads_LE).abs().sum())
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        gap = float((value - whole.state_dict()[name]).abs().max())
        gaps["weights"] = max(gaps.get("weights", 0.0), gap)
    return gaps


def main() -> None:
    rank, store, result = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gaps = {"sharded": sharded(rank)}
    result.write_text(json.dumps(gaps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
