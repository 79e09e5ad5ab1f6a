"""A model's parts given to ranks, from outside: experts cut, tokens dispatched, weights sharded.

The model knows nothing of it. Afterwards its parameters are this rank's rows of the whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from rorqual.model import DeepseekV3
from rorqual.model.moe import Experts
from rorqual.parallel.dispatch import ExpertDispatcher, Traffic
from rorqual.parallel.groups import BETWEEN, SHARD, WEIGHTS, WITHIN, Groups, Place
from rorqual.parallel.settings import ParallelSettings


class Rows(NamedTuple):
    """The rows of a whole tensor, of `total`, that a rank holds of its first dimension."""

    start: int
    stop: int
    total: int


class Spread:
    """What this rank holds of a model, and how the rest comes to it while `roots` run: one, or the
    stages of a pipeline.

    Gradients are summed over ranks: the loss has the coefficients of the whole batch.
    `train.ranks.Spread` says what is asked of it.
    """

    def __init__(self, model: DeepseekV3, roots: Sequence[nn.Module], groups: Groups) -> None:
        self.options, self.groups = groups.options, groups
        self.roots = roots
        self.traffic = Traffic()
        self.totals = {name: len(value) for name, value in model.named_parameters()}
        self.of_experts = {
            f"{place}.{name}"
            for place, module in model.named_modules()
            if isinstance(module, Experts)
            for name, _ in module.named_parameters()
        }
        if self.options.ep > 1:
            self._share_experts(model)
        if self.options.num_replicas > 1:
            self._shard(model)

    def _share_experts(self, model: DeepseekV3) -> None:
        aside = None
        if self.options.is_overlapped:
            aside = self.groups.aside[WITHIN], self.groups.aside[BETWEEN]
        dispatcher = ExpertDispatcher(
            self.groups.of(WITHIN),
            self.groups.of(BETWEEN),
            model.config.n_routed_experts,
            self.traffic,
            aside,
        )
        for layer in model.sparse_layers():
            for name, parameter in list(layer.experts.named_parameters()):
                own = parameter.detach().chunk(self.options.ep)[self.groups.place.ep].clone()
                setattr(layer.experts, name, nn.Parameter(own, parameter.requires_grad))
        for block in model.model.layers.values():
            block.register_forward_pre_hook(_OtherDispatcher(dispatcher))

    def _shard(self, model: DeepseekV3) -> None:
        """`fully_shard` on experts, layers and root, where there is anybody to share with.

        Choice: experts that no other rank holds stay plain parameters, which FSDP would copy.
        """
        options: dict[str, Any] = {"reshard_after_forward": self.options.zero == 3}
        alone: set[nn.Parameter] = set()
        for layer in model.sparse_layers():
            if self.options.dp_shard * self.options.dp_replicate == 1:
                alone |= set(layer.experts.parameters())
            elif self.options.ep > 1:
                fully_shard(layer.experts, mesh=self.groups.sharding(SHARD), **options)
        options |= {"mesh": self.groups.sharding(WEIGHTS), "ignored_params": alone}
        for block in model.model.layers.values():
            fully_shard(block, **options)
        # Head and embedding are wanted again as soon as the backward pass begins.
        options["reshard_after_forward"] = False
        for root in self.roots:
            fully_shard(root, **options)
            # The embedding of a pipeline's first stage may be that of its last: one gathers it.
            options["ignored_params"] = options["ignored_params"] | set(root.parameters())
        for module in self._sharded():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _sharded(self) -> Iterator[FSDPModule]:
        modules = (module for root in self.roots for module in root.modules())
        return (module for module in modules if isinstance(module, FSDPModule))

    def micro_batch(self, is_last: bool) -> None:
        """Before each pass: the step's last one ends with the sums over ranks. ZeRO-1 keeps weights
        and gradients whole until then; ZeRO-3 shards both after each pass.
        """
        is_whole = self.options.zero == 1
        for module in self._sharded():
            module.set_is_last_backward(is_last)
            module.set_reshard_after_backward(is_last or not is_whole, recurse=False)
            module.set_requires_gradient_sync(is_last or not is_whole, recurse=False)
            module.set_requires_all_reduce(is_last, recurse=False)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model can be called by parts, without its root, on all ranks at once."""
        for root in self.roots:
            if isinstance(root, FSDPModule):
                root.unshard()
        try:
            yield
        finally:
            for module in self._sharded():
                module.reshard()

    def bytes_sent(self) -> tuple[int, int]:
        return self.traffic.take()

    def rows(self, name: str, rank: int | None = None) -> Rows:
        """Of the parameter of that name, those of a rank; of this one if None."""
        place = Place.of(self.groups.rank if rank is None else rank, self.options)
        return rows_of(self.totals[name], place, self.options, name in self.of_experts)

    def place(self, name: str, own: Tensor) -> tuple[int, int]:
        """The first of this rank's rows of a parameter, and how many the whole has."""
        rows = self.rows(name)
        assert rows.stop - rows.start == len(own), "FSDP divides as `rows_of` says"
        return rows.start, rows.total


class _OtherDispatcher:
    """Gives the step of a block another dispatcher; it is the last of what a block takes."""

    def __init__(self, dispatcher: ExpertDispatcher) -> None:
        self.dispatcher = dispatcher

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        *states, step = inputs
        return *states, step._replace(dispatcher=self.dispatcher)


def rows_of(total: int, place: Place, options: ParallelSettings, is_of_experts: bool) -> Rows:
    """As `fully_shard` divides: pieces of equal size, the last ones shorter or empty."""
    if is_of_experts:
        num_own = total // options.ep
        first, shard, num_shards = place.ep * num_own, place.dp_shard, options.dp_shard
    else:
        num_own, first, num_shards = total, 0, options.num_shards
        shard = place.dp_shard * options.ep + place.ep
    size = -(-num_own // num_shards)
    start, stop = (first + min(edge * size, num_own) for edge in (shard, shard + 1))
    return Rows(start, stop, total)
