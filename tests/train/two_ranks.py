"""One training step on two processes, for test_seams.py: sharded, and as a pipeline of two stages.

python two_ranks.py RANK STORE_FILE RESULT_FILE
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_run import SyntheticBatches, small_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate
from torch.distributed.tensor import DTensor

from rorqual.config import fill
from rorqual.model import DeepseekV3
from rorqual.train.loss import LossParts, TrainingModel, balance_seen, coefficients, target_counts
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


class StageLoss(nn.Module):
    """What a pipeline runs: a stage's tensor, the last one's loss."""

    def __init__(self, root: TrainingModel) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        is_first = self.root.model.lm_head is None
        out = self.root(None if is_first else x, **given)
        return out.total[None] if isinstance(out, LossParts) else out


def stage_of(model: DeepseekV3, rank: int) -> DeepseekV3:
    """The first stage has layers 0 and 1, the last one layer 2, MTP and a copy of the embedding."""
    stage = copy.deepcopy(model)
    for layer_id in list(stage.model.layers):
        if (int(layer_id) < 2) != (rank == 0):
            del stage.model.layers[layer_id]
    if rank == 0:
        stage.model.norm = None
        stage.lm_head = None
    return stage


def pipelined(rank: int) -> dict[str, float]:
    """1F1B of torch's runtime over two stages, which share the samples."""
    tokens_BS, mask_BS, documents_BS = samples()
    whole, stage = make_model(), stage_of(make_model(), rank)
    counts_C = target_counts(mask_BS, 1, documents_BS)
    by = coefficients(counts_C, NUM_SAMPLES, VALUES.mtp_weight, VALUES.balance_alpha)
    given = {"tokens_BS": tokens_BS, "mask_BS": mask_BS, "documents_BS": documents_BS, "by": by}
    expected = TrainingModel(whole)(**given).total
    expected.backward()
    expected_balance = balance_seen(whole)

    module = StageLoss(TrainingModel(stage))
    rows = TensorChunkSpec(0)
    specs = {name: rows for name in given if name != "by"}
    schedule = Schedule1F1B(
        PipelineStage(module, rank, 2, torch.device("cpu")),
        n_microbatches=NUM_SAMPLES // MICRO_BATCH,
        loss_fn=lambda loss, _: loss.sum(),
        scale_grads=False,
        kwargs_chunk_spec={**specs, "by": type(by)(*[_Replicate()] * len(by))},
    )
    losses: list[Tensor] = []
    for _ in range(2):
        # The runtime's first step runs a backward pass more, to learn shapes: the second counts.
        stage.zero_grad()
        balance_seen(stage)
        losses.clear()
        if rank == 0:
            schedule.step(tokens_BS, **given)
        else:
            schedule.step(target=torch.zeros(NUM_SAMPLES), losses=losses, **given)
    gaps = {}
    if rank == 1:
        gaps["loss"] = float((torch.stack(losses).sum() - expected).detach().abs())
    embedding = stage.get_parameter("model.embed_tokens.weight")
    assert embedding.grad is not None
    dist.all_reduce(embedding.grad)  # the copy's and the first stage's
    gaps["gradients"] = max(
        float((_grad(p) - _grad(whole.get_parameter(name))).abs().max())
        for name, p in stage.named_parameters()
    )
    gaps["smallest"] = min(float(_grad(p).abs().max()) for p in stage.parameters())
    seen = balance_seen(stage)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    gaps["loads"] = float((seen.loads_LE - expected_balance.loads_LE[own]).abs().sum())
    loss = seen.loss.clone()
    dist.all_reduce(loss)
    gaps["balance"] = float((loss - expected_balance.loss).abs())
    return gaps


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def main() -> None:
    rank, store, result = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gaps = {"sharded": sharded(rank), "pipelined": pipelined(rank)}
    result.write_text(json.dumps(gaps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
