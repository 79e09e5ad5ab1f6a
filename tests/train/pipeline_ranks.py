"""Training steps in a pipeline of several processes, for test_in_pipeline.py.

python pipeline_ranks.py RANK NUM_RANKS STORE_FILE CASES_FILE RESULT_FILE

Each case, a table of `Case`, is trained on one process and in the pipeline; the result says for
each how far apart they are.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_run import LENGTH, SyntheticBatches, small_model
from torch import Tensor

from rorqual.config import fill
from rorqual.model import DeepseekV3
from rorqual.model.transformer import materialise
from rorqual.parallel import make_orders
from rorqual.parallel.stages import Placement, RankStages, rank_model
from rorqual.train.batches import TokenLosses
from rorqual.train.in_pipeline import InPipeline, LossesInPipeline
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.ranks import OneRank
from rorqual.train.recompute import recompute_layers
from rorqual.train.step import Stepper, StepResult, StepValues
from rorqual.train.validation import LossesInTurn, Validation, validate

SEED = 1  # of small_model


@dataclass
class Case:
    """One plan and one training; `model` has the fields of the configuration that differ."""

    order: str = "1f1b"
    num_chunks: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    num_micro_batches: int = 4
    num_steps: int = 2
    is_isolated: bool = False
    is_recomputed: bool = False
    precision: str = "float32"
    moments: str = "float32"

    def __post_init__(self) -> None:
        self.model = {"num_hidden_layers": 8, "tie_word_embeddings": False, **self.model}


def samples(case: Case, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, mask, documents); isolated are two documents a sample, and padding."""
    num_samples = 2 * case.num_micro_batches
    depths = case.model.get("num_nextn_predict_layers", 1)
    tokens_BS = SyntheticBatches(depths).batch(step * num_samples, num_samples).tokens_BS
    generator = torch.Generator().manual_seed(step)
    mask_BS = torch.rand(tokens_BS.shape, generator=generator) < 0.6
    if not case.is_isolated:
        return tokens_BS, mask_BS, None
    documents_BS = torch.ones_like(tokens_BS)
    documents_BS[:, 7:] = 2
    documents_BS[::3, 14:] = 0
    return tokens_BS, mask_BS & (documents_BS > 0), documents_BS


class OverStages(OneRank):
    """Ranks of one pipeline, which share all samples."""

    def norm(self, own: Tensor) -> Tensor:
        squares = own.double().square()
        dist.all_reduce(squares)
        return squares.sqrt().to(own.dtype)


def train(case: Case, model: DeepseekV3, pipeline: InPipeline | None) -> list[StepResult]:
    options = fill(OptimizerSettings, {"clip_norm": 0.5, "moments": case.moments})
    optimizer = AdamW(model, options)
    if pipeline is not None:
        optimizer.copies = pipeline.copies
    stepper = Stepper(
        model,
        optimizer,
        pipeline,
        micro_batch_size=2,
        precision=case.precision,
        ranks=OverStages() if pipeline else None,
    )
    values = StepValues(lr=1e-3, mtp_weight=0.3, balance_alpha=0.01, bias_update_speed=0.01)
    results = []
    for step in range(case.num_steps):
        if pipeline is not None and step == 1:
            pipeline.begin_timeline()
        tokens_BS, mask_BS, documents_BS = samples(case, step)
        results.append(stepper.step(tokens_BS, mask_BS, values, documents_BS))
    return results


def gaps(case: Case) -> dict[str, Any]:
    whole = small_model(**case.model)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    placement = Placement(case.order, num_ranks, case.num_chunks)
    shares = placement.shares(whole.config, LENGTH, rank)
    held = rank_model(whole.config, shares)
    materialise(held, "cpu")
    held.reset_parameters(torch.Generator().manual_seed(SEED))
    same_start = all(torch.equal(p, whole.get_parameter(n)) for n, p in held.named_parameters())
    for model in (held, whole):
        model.train()
        if case.is_recomputed:
            recompute_layers(model)
    group = dist.group.WORLD
    assert group is not None
    stages = RankStages(placement, shares, group)
    pipeline = InPipeline(held, stages, is_recomputed=case.is_recomputed)
    expected, found = train(case, whole, None), train(case, held, pipeline)
    differences: dict[str, Any] = {"same_start": same_start, "layers": list(held.model.layers)}
    for name in ("loss", "main", "balance", "grad_norm"):
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(expected, found, strict=True)]
        differences[name] = [abs(a - b) / max(abs(a), 1e-9) for a, b in pairs]
    differences["mtp"] = [
        abs(a - b)
        for one, other in zip(expected, found, strict=True)
        for a, b in zip(one.mtp, other.mtp, strict=True)
    ]
    differences["loads"] = [
        int((a.loads_LE - b.loads_LE).abs().sum()) for a, b in zip(expected, found, strict=True)
    ]
    differences["timeline"] = timeline_of(pipeline, case)
    one = held_out(case, whole, LossesInTurn(whole))
    other = held_out(case, held, LossesInPipeline(pipeline))
    differences["held_out"] = abs(one.nats - other.nats) / one.nats
    differences["held_out_counts"] = abs(one.num_bytes - other.num_bytes)
    run = pipeline._run
    assert run is not None
    differences["kept"] = sum(
        info.buffer is not None and not info.buffer.is_meta
        for stage in run[1].stages
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
        for info in infos
    )
    named = dict(held.named_parameters())
    differences["gradients"] = max(
        _relative(p.grad, whole.get_parameter(name).grad) for name, p in named.items()
    )
    differences["weights"] = max(
        float((p - whole.get_parameter(name)).abs().max()) for name, p in named.items()
    )
    differences["bias"] = max(
        (
            float((b - whole.get_buffer(name)).abs().max())
            for name, b in held.named_buffers()
            if name.endswith("bias")
        ),
        default=0.0,
    )
    return differences


def held_out(case: Case, model: DeepseekV3, losses: TokenLosses) -> Validation:
    """Of 11 samples in parts of 2, so that the last one is smaller."""
    depths = case.model.get("num_nextn_predict_layers", 1)
    batches = SyntheticBatches(depths, is_isolated=case.is_isolated)
    bytes_V = torch.arange(model.config.vocab_size) % 3
    return validate(
        model, batches, bytes_V, num_samples=11, batch_size=2, num_inputs=LENGTH, losses=losses
    )


def timeline_of(pipeline: InPipeline, case: Case) -> dict[str, Any]:
    """What was recorded, beside the order that should have run."""
    record = json.loads(json.dumps(pipeline.timeline().with_intervals()))
    place = pipeline.placement
    orders = make_orders(place.order, place.num_ranks, case.num_micro_batches, place.num_chunks)
    wanted = [[str(part) for each in order for part in each.parts] for order in orders]
    ran = [[each["action"] for each in own] for own in record["timeline"]]
    own = record["timeline"]
    return {
        "is_the_order": ran == wanted,
        "is_in_turn": all(a["end"] <= b["start"] for each in own for a, b in pairwise(each)),
        "num_stages": record["num_stages"],
        "bubbles": record["bubbles"],
        "end": record["end"],
    }


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def main() -> None:
    rank, num_ranks = int(sys.argv[1]), int(sys.argv[2])
    store, cases, result = (Path(name) for name in sys.argv[3:6])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    found = [gaps(Case(**table)) for table in json.loads(cases.read_text())]
    result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
