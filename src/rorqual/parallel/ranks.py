"""What one rank of a training run asks of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.rendezvous import rendezvous

from rorqual.errors import TrainingError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.parallel.groups import DATA, PP, WEIGHTS, Groups
from rorqual.parallel.launch import Launch
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.spread import Spread
from rorqual.parallel.stages import RankStages

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
PATIENCE = timedelta(hours=12)


class ManyRanks:
    """This rank among all, as `train.ranks.Ranks` has it."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.options = groups, groups.options
        self.rank, self.world = groups.rank, groups.world
        self.num_replicas = self.options.num_replicas
        self.replica = self.rank % self.num_replicas
        # Signals and errors are told on the host, whatever the device.
        self.host = dist.new_group(backend="gloo", timeout=_limit(self.options))
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def stages(self, config: ModelConfig, num_inputs: int) -> RankStages | None:
        if (placement := self.options.placement) is None:
            return None
        shares = placement.shares(config, num_inputs, self.groups.place.pp)
        return RankStages(placement, shares, self.groups.of(PP), self.options.is_overlapped)

    def spread(self, model: DeepseekV3, roots: Sequence[nn.Module]) -> Spread:
        return Spread(model, roots, self.groups)

    def sum(self, values: Tensor) -> Tensor:
        return _summed(values, self.groups.of(DATA))

    def norm(self, own: Tensor) -> Tensor:
        squares = own.double().square()
        for axis in (WEIGHTS, PP):
            squares = _summed(squares, self.groups.of(axis))
        return squares.sqrt().to(own.dtype)

    def agree(self, number: int, *, is_patient: bool = False) -> int:
        told = torch.tensor(number)
        group = self.patient if is_patient else self.host
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        return int(told)

    @contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        try:
            yield
        except RuntimeError as problem:
            if not _is_of_transport(problem):
                raise
            raise TrainingError(
                f"rank {self.rank} of {self.world} lost another rank in {what()}",
                found=str(problem).splitlines()[0],
                expected=f"an answer within {self.options.timeout_seconds:g} s "
                "(parallel.timeout_seconds)",
                fix="look for the rank that failed first; the same command goes on from the last "
                "checkpoint",
            ) from None


@contextmanager
def joined(
    options: ParallelSettings,
    device: torch.device,
    launch: Launch,
    store: dist.Store | None = None,
) -> Iterator[ManyRanks]:
    """This process as one of all; NCCL on GPUs, gloo on CPUs. The ranks meet at torchrun's address,
    or in a `store`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if store is None:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world, timeout=_limit(options)))
        # torchrun keeps its store from start to start: what the ranks before wrote is out of date.
        store = dist.PrefixStore(f"start {launch.restart}", store)
    dist.init_process_group(
        BACKENDS[device.type],
        timeout=_limit(options),
        store=store,
        rank=launch.rank,
        world_size=launch.world,
    )
    try:
        yield ManyRanks(Groups(options, device, launch.local_world))
    finally:
        dist.destroy_process_group()


def _limit(options: ParallelSettings) -> timedelta:
    return timedelta(seconds=options.timeout_seconds)


def _summed(values: Tensor, group: ProcessGroup) -> Tensor:
    values = values.clone()
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def _is_of_transport(problem: RuntimeError) -> bool:
    return isinstance(problem, dist.DistError) or "gloo" in str(problem).lower()
