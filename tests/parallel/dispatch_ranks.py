"""Tokens of four ranks, of which one has none, on their way to eight experts on two nodes.

    python dispatch_ranks.py RANK STORE_FILE RESULT_FILE

Each rank compares with a dispatcher that has all experts; the result holds the gaps and what was
counted beside what it should be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.model.dispatch import Dispatched, Dispatcher, LocalDispatcher
from rorqual.model.router import Routing
from rorqual.parallel.dispatch import ExpertDispatcher, Traffic
from rorqual.parallel.groups import BETWEEN, WITHIN, Groups
from rorqual.parallel.settings import ParallelSettings

WORLD, PER_NODE, NUM_EXPERTS, NUM_CHOICES, DIM = 4, 2, 8, 3, 5
NUM_TOKENS = (6, 0, 9, 1)
FLOAT, ID = 4, 8


def tokens_of(rank: int, dtype: torch.dtype) -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(rank)
    num = NUM_TOKENS[rank]
    x_TD = torch.randn(num, DIM, generator=generator).to(dtype).requires_grad_()
    scores_TE = torch.rand(num, NUM_EXPERTS, generator=generator)
    weights_TK, experts_TK = scores_TE.topk(NUM_CHOICES)
    return x_TD, Routing(weights_TK.requires_grad_(), experts_TK, scores_TE)


def experts_of(first: int, count: int) -> Tensor:
    matrices = torch.randn(NUM_EXPERTS, DIM, DIM, generator=torch.Generator().manual_seed(99))
    return matrices[first : first + count].clone().requires_grad_()


def computed(matrices_EDD: Tensor, dispatched: Dispatched) -> Tensor:
    """Rows of each expert times its matrix, each times its gate value."""
    parts = dispatched.rows_ND.split(dispatched.counts_E.tolist())
    products = [rows @ m.to(rows.dtype) for rows, m in zip(parts, matrices_EDD, strict=True)]
    return torch.cat(products) * dispatched.weights_N[:, None].to(dispatched.rows_ND.dtype)


def through(
    dispatcher: Dispatcher, rank: int, matrices_EDD: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, gradients of states and of gate values)."""
    x_TD, routing = tokens_of(rank, dtype)
    dispatched = dispatcher.dispatch(x_TD, routing, NUM_EXPERTS)
    out_TD = dispatcher.combine(computed(matrices_EDD, dispatched), routing, dispatched)
    (out_TD.float().sin().sum()).backward()
    assert x_TD.grad is not None
    assert routing.weights_TK.grad is not None
    return out_TD.detach(), x_TD.grad, routing.weights_TK.grad


def counted_by_hand(rank: int) -> dict[str, int]:
    """Rows that the rank sends to others: forth between nodes, forth within its node."""
    node, number = divmod(rank, PER_NODE)
    per_node, per_rank = NUM_EXPERTS // WORLD * PER_NODE, NUM_EXPERTS // WORLD
    between = within = 0
    for other in range(WORLD):
        for experts in tokens_of(other, torch.float32)[1].experts_TK.tolist():
            if other == rank:
                between += len({expert // per_node for expert in experts} - {node})
            if other % PER_NODE == number:  # its tokens come through this rank into the node
                here = {expert // per_rank for expert in experts if expert // per_node == node}
                within += len(here - {rank})
    return {"between": between, "within": within}


def received_by_hand(rank: int) -> dict[str, int]:
    """Rows that come to the rank from others: as many go home again."""
    node, number = divmod(rank, PER_NODE)
    per_node, per_rank = NUM_EXPERTS // WORLD * PER_NODE, NUM_EXPERTS // WORLD
    between = within = 0
    for other in range(WORLD):
        for experts in tokens_of(other, torch.float32)[1].experts_TK.tolist():
            if other % PER_NODE == number and other // PER_NODE != node:
                between += any(expert // per_node == node for expert in experts)
            if other % PER_NODE != number:
                within += any(expert // per_rank == rank for expert in experts)
    return {"between": between, "within": within}


def bytes_by_hand(rank: int) -> dict[str, int]:
    """Forth: states, gate values, ids; back: the states. Gradients the other way round."""
    sent, received = counted_by_hand(rank), received_by_hand(rank)
    forth = DIM * FLOAT + NUM_CHOICES * (FLOAT + ID) + DIM * FLOAT  # ... and combine's gradients
    back = DIM * FLOAT + DIM * FLOAT + NUM_CHOICES * FLOAT
    return {axis: sent[axis] * forth + received[axis] * back for axis in sent}


def gap(found: Tensor, expected: Tensor) -> float:
    """Of the largest value."""
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    rank, store, result = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    shared = dist.FileStore(store, WORLD)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=WORLD)
    options = ParallelSettings(ep=WORLD, ranks_per_node=PER_NODE)
    groups = Groups(options, torch.device("cpu"), WORLD)
    traffic = Traffic()
    dispatcher = ExpertDispatcher(groups.of(WITHIN), groups.of(BETWEEN), NUM_EXPERTS, traffic)
    num_own = NUM_EXPERTS // WORLD
    told: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        own_EDD, all_EDD = experts_of(rank * num_own, num_own), experts_of(0, NUM_EXPERTS)
        traffic.take()
        found = through(dispatcher, rank, own_EDD, dtype)
        within, between = traffic.take()
        expected = through(LocalDispatcher(), rank, all_EDD, dtype)
        names = ("output", "states", "gates")
        gaps = {
            name: gap(one, other) for name, one, other in zip(names, found, expected, strict=True)
        }
        # What an expert learns comes from the tokens of all ranks.
        assert all_EDD.grad is not None
        assert own_EDD.grad is not None
        dist.all_reduce(all_EDD.grad)
        whole = all_EDD.grad[rank * num_own : (rank + 1) * num_own]
        gaps["experts"] = gap(own_EDD.grad, whole)
        told[str(dtype)] = gaps
        if dtype == torch.float32:
            told["bytes"] = {"within": within, "between": between}
    told["by hand"] = bytes_by_hand(rank)
    result.write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
