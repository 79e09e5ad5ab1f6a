"""Tokens on their way to experts of other ranks, and back (report §3.2.2).

A token goes once to each node that has an expert of it, to the rank there of the same number as its
own, which hands it on within the node, once to each rank that has one. On the way back each rank
sums what its experts made of a token, then each node what its ranks made, so that one row a node
comes home. Gate values travel with the rows, and their gradients back.

Every rank makes the same calls in the same order, without tokens too: all others wait for the one
that leaves a call out.
"""

# T tokens, D hidden size, E experts of this rank, K experts per token, H rows that a hop sends,
# N rows sorted by expert, P ranks of a hop

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rorqual.model.dispatch import Dispatched
from rorqual.model.router import Routing
from rorqual.parallel.aside import group_of_thread

NOWHERE = -1  # in place of an expert that is not where its row goes


@dataclass
class Traffic:
    """Bytes that this rank sent to others since `take`: hidden states, gate values, numbers of
    experts, and gradients.
    """

    within_nodes: int = 0
    between_nodes: int = 0
    lock: Lock = field(default_factory=Lock)  # two passes may send at the same time

    def add(self, num_bytes: int, *, is_between_nodes: bool) -> None:
        with self.lock:
            if is_between_nodes:
                self.between_nodes += num_bytes
            else:
                self.within_nodes += num_bytes

    def take(self) -> tuple[int, int]:
        """Within nodes and between them; counts anew."""
        taken = self.within_nodes, self.between_nodes
        self.within_nodes = self.between_nodes = 0
        return taken


class Hop(NamedTuple):
    """Ranks that exchange rows. Each `span` experts that follow each other are those of the next
    rank, and after the last one again of the first. `aside` are the same ranks, for passes aside.
    """

    group: ProcessGroup
    aside: ProcessGroup | None
    span: int
    is_between_nodes: bool
    traffic: Traffic

    @property
    def now(self) -> ProcessGroup:
        return group_of_thread(self.group, self.aside)

    def owners(self, experts_TK: Tensor) -> Tensor:
        """Which rank of the hop has each expert; NOWHERE stays so."""
        owners_TK = experts_TK.div(self.span, rounding_mode="floor") % self.group.size()
        return owners_TK.where(experts_TK >= 0, NOWHERE)

    def exchange(self, values: Tensor, to_P: list[int], from_P: list[int]) -> Tensor:
        """Rows for each rank in turn -> rows from each rank in turn; without gradients."""
        arrived = values.new_empty(sum(from_P), *values.shape[1:])
        dist.all_to_all_single(arrived, values.contiguous(), from_P, to_P, group=self.now)
        num_sent = sum(to_P) - to_P[self.group.rank()]
        num_bytes = num_sent * values[:1].numel() * values.element_size() if num_sent else 0
        self.traffic.add(num_bytes, is_between_nodes=self.is_between_nodes)
        return arrived


class Leg(NamedTuple):
    """What a hop did: of `num_rows` rows it sent those numbered `sent_H`, so many to each rank, and
    so many came.
    """

    hop: Hop
    num_rows: int
    sent_H: Tensor
    to_P: list[int]
    from_P: list[int]


class Route(NamedTuple):
    """The way back: the legs, and for each sorted row which of the arrived ones it is of."""

    legs: list[Leg]
    rows_N: Tensor
    num_arrived: int


class ExpertDispatcher:
    """`model.dispatch.Dispatcher` over the ranks that share the experts, of which the r-th has the
    experts [r E, (r + 1) E).

    `within` are the ranks of this node, `between` those of this number on all nodes; `aside` are
    both again, in this order, where two passes run at the same time.
    """

    def __init__(
        self,
        within: ProcessGroup,
        between: ProcessGroup,
        num_experts: int,
        traffic: Traffic,
        aside: tuple[ProcessGroup, ProcessGroup] | None = None,
    ) -> None:
        within_aside, between_aside = aside or (None, None)
        self.num_own = num_experts // (within.size() * between.size())
        rank = between.rank() * within.size() + within.rank()
        self.first = rank * self.num_own
        hops = [
            Hop(between, between_aside, self.num_own * within.size(), True, traffic),
            Hop(within, within_aside, self.num_own, False, traffic),
        ]
        self.hops = [hop for hop in hops if hop.group.size() > 1]

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        """All ranks' rows for this rank's experts; `counts_E` is of these alone."""
        rows, weights, experts = x_TD, routing.weights_TK, routing.experts_TK
        legs = []
        for hop in self.hops:
            leg, experts = _set_out(hop, experts)
            rows, weights = _Exchange.apply(leg, rows[leg.sent_H], weights[leg.sent_H])
            legs.append(leg)
        own = experts.flatten() - self.first
        pairs = ((own >= 0) & (own < self.num_own)).nonzero()[:, 0]
        order_N = pairs[own[pairs].argsort(stable=True)]
        counts_E = torch.bincount(own[pairs], minlength=self.num_own)
        rows_N = order_N // experts.shape[1]
        route = Route(legs, rows_N, rows.shape[0])
        return Dispatched(rows[rows_N], counts_E, weights.flatten()[order_N], order_N, route=route)

    def combine(self, out_ND: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor:
        """(T, D), each token's sum over its experts, wherever they are."""
        legs, rows_N, num_arrived = dispatched.route
        out = _summed(out_ND, rows_N, num_arrived)
        for leg in reversed(legs):
            (back,) = _Exchange.apply(leg._replace(to_P=leg.from_P, from_P=leg.to_P), out)
            out = _summed(back, leg.sent_H, leg.num_rows)
        return out


def _set_out(hop: Hop, experts_TK: Tensor) -> tuple[Leg, Tensor]:
    """Which rows go where, and the experts of those that come."""
    owners_TK = hop.owners(experts_TK)
    size = hop.group.size()
    ranks_P = torch.arange(size, device=experts_TK.device)
    goes_PT = (owners_TK == ranks_P[:, None, None]).any(-1)
    to_rank_H, sent_H = goes_PT.nonzero(as_tuple=True)
    num_to_P = goes_PT.sum(1)
    num_from_P = torch.empty_like(num_to_P)
    dist.all_to_all_single(num_from_P, num_to_P, group=hop.now)
    leg = Leg(hop, len(experts_TK), sent_H, num_to_P.tolist(), num_from_P.tolist())
    is_there_HK = owners_TK[sent_H] == to_rank_H[:, None]
    experts_HK = experts_TK[sent_H].where(is_there_HK, NOWHERE)
    return leg, hop.exchange(experts_HK, leg.to_P, leg.from_P)


def _summed(rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
    """Rows added up by place, in float32, of their own dtype."""
    sums = torch.zeros(num_rows, rows.shape[1], dtype=torch.float32, device=rows.device)
    return sums.index_add(0, places, rows.float()).to(rows.dtype)


class _Exchange(torch.autograd.Function):
    """Rows of a leg to their ranks; the gradients of those that came go back to theirs."""

    @staticmethod
    def forward(ctx: Any, leg: Leg, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.leg = leg
        return tuple(leg.hop.exchange(value, leg.to_P, leg.from_P) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leg = ctx.leg
        back = (leg.hop.exchange(gradient, leg.from_P, leg.to_P) for gradient in gradients)
        return None, *back
