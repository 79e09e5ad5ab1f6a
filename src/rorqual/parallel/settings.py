"""How many ranks share a training run, and along which axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from rorqual.config import settings
from rorqual.errors import ConfigError, UsageError
from rorqual.model import ModelConfig
from rorqual.parallel.pipeline import PIPELINE_ORDERS
from rorqual.parallel.stages import Placement, cut


@settings
class ParallelSettings:
    """How many ranks share the run, and along which axes; the product is torchrun's number of
    processes.
    """

    pp: int = Field(default=1, gt=0)
    """Ranks of the pipeline: each holds some of the layers."""
    ep: int = Field(default=1, gt=0)
    """Ranks that share the routed experts; each takes samples of its own."""
    dp_shard: int = Field(default=1, gt=0)
    """Ranks that take samples of their own and share weights, gradients and moments."""
    dp_replicate: int = Field(default=1, gt=0)
    """Copies of all that, which take samples of their own."""
    zero: Literal[1, 3] = 1
    """1: shared weights are gathered once a step; 3: for each pass through a layer, and let go of
    behind it."""
    order: Literal["1f1b", "interleaved", "zb1p", "zbv", "dualpipev"] = "1f1b"
    """In which order a rank of the pipeline runs its micro-batches (`rorqual pipeline`)."""
    chunks: int | None = Field(default=None, gt=1)
    """Stages a rank of a pipeline has, in the order `interleaved` alone; left out: 2."""
    timeline_step: int | None = Field(default=None, gt=0)
    """The step of which a pipeline writes `timeline.json`: what each rank ran when."""
    ranks_per_node: int | None = Field(default=None, gt=0)
    """Ranks whose transfers count as within a node, and to which a token is sent once; left out:
    torchrun's processes of a machine."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a rank waits for another within a step, before it ends with an error."""

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        if self.chunks is not None and self.order != "interleaved":
            raise ValueError(f"chunks are for the order interleaved, and not for {self.order}")
        return self

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.num_replicas

    @property
    def num_replicas(self) -> int:
        """Ranks that take samples of their own; the stages of a pipeline share theirs."""
        return self.dp_replicate * self.num_shards

    @property
    def num_shards(self) -> int:
        """Ranks that together hold a stage's weights once."""
        return self.dp_shard * self.ep

    @property
    def axes(self) -> str:
        """Its axes as a product, as in `ep 2 x dp_shard 4`."""
        sizes = ((name, getattr(self, name)) for name in ("pp", "dp_replicate", "dp_shard", "ep"))
        return " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one rank"

    @property
    def placement(self) -> Placement | None:
        """Which ranks of a pipeline have which stages. Of one rank there is one in `dualpipev`
        alone, for its pairs of passes.
        """
        if self.pp == 1 and self.order != "dualpipev":
            return None
        return Placement(self.order, self.pp, self.chunks)

    @property
    def is_overlapped(self) -> bool:
        """Do two passes run at the same time, each of which hides what the other sends?"""
        return self.order == "dualpipev" and self.ep > 1

    def check_batch(self, num_micro_batches: int) -> None:
        """UsageError where a pipeline cannot run so many."""
        if (place := self.placement) is not None:
            PIPELINE_ORDERS[place.order](0, place.num_ranks, num_micro_batches)

    def check_world(self, found: int) -> None:
        """UsageError where torchrun started another number of processes."""
        if found == self.world:
            return
        start = f"torchrun --nproc-per-node {self.world} -m -- rorqual train RECIPE"
        if self.world == 1:
            start = "start `rorqual train` without torchrun"
        raise UsageError(
            "the recipe wants another number of ranks than were started",
            found=f"{found} process{'es' if found > 1 else ''} (WORLD_SIZE)",
            expected=f"{self.world}: [parallel] {self.axes}",
            fix=f"{start}; or change [parallel], as in --set parallel.dp_shard={found}",
        )

    def check_model(self, config: ModelConfig) -> None:
        """ConfigError where the model cannot be divided so."""
        for problem in self._problems(config):
            raise problem

    def _problems(self, config: ModelConfig) -> Iterator[ConfigError]:
        if self.placement is not None:
            try:
                cut(config, self.placement.num_stages, num_inputs=1)
            except UsageError as problem:
                yield ConfigError(
                    problem.what, found=problem.found, expected=problem.expected, fix=problem.fix
                )
        has_experts = any(map(config.is_moe_layer, range(config.num_layers_with_mtp)))
        if self.ep > 1 and not has_experts:
            yield ConfigError(
                "parallel.ep has no effect: the model has no experts",
                found=f"parallel.ep {self.ep}",
                fix="set parallel.ep to 1, and dp_shard in its place",
            )
        if has_experts and config.n_routed_experts % self.ep:
            yield ConfigError(
                "the experts cannot be divided among so many ranks",
                found=f"{config.n_routed_experts} experts, parallel.ep {self.ep}",
                expected="a number of ranks that divides model.n_routed_experts",
                fix="change parallel.ep",
            )
        per_node = self.ranks_per_node
        if per_node is not None and self.ep % per_node and per_node % self.ep:
            yield ConfigError(
                "the ranks that share experts do not fill whole nodes",
                found=f"parallel.ep {self.ep}, parallel.ranks_per_node {per_node}",
                expected="one of them a multiple of the other",
                fix="change parallel.ranks_per_node",
            )
