"""Which ranks of a training run share what.

Ranks are numbered with the axes (pp, dp_replicate, dp_shard, ep), the last one running fastest, so
that those which share experts are neighbours (§3.2.2: few transfers between nodes). Each rank of
dp_replicate x dp_shard x ep takes samples of its own. The dp_shard x ep ranks of one replica hold
the weights of their stage once: dense ones are divided by all of them, a rank's experts by those of
dp_shard, which have the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rorqual.parallel.settings import ParallelSettings

PP, REPLICATE, SHARD, EP = "pp", "dp_replicate", "dp_shard", "ep"
WEIGHTS, DATA = "weights", "data"  # dp_shard x ep; dp_replicate x dp_shard x ep
BETWEEN, WITHIN = "between", "within"  # nodes, of the ranks of ep


class Place(NamedTuple):
    """A rank's number on each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    ep: int

    @classmethod
    def of(cls, rank: int, options: ParallelSettings) -> Place:
        rest, ep = divmod(rank, options.ep)
        rest, dp_shard = divmod(rest, options.dp_shard)
        pp, dp_replicate = divmod(rest, options.dp_replicate)
        return cls(pp, dp_replicate, dp_shard, ep)


class Groups:
    """The groups of this rank, on each axis and on some together; made on all ranks at once."""

    def __init__(
        self, options: ParallelSettings, device: torch.device, ranks_per_node: int
    ) -> None:
        self.options, self.device = options, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.place = Place.of(self.rank, options)
        # Choice: where nodes do not hold whole groups, what divides both is the node.
        per_node = math.gcd(options.ep, options.ranks_per_node or ranks_per_node)
        self.meshes: dict[str, DeviceMesh] = {}
        self.aside: dict[str, ProcessGroup] = {}
        self._mesh(
            {
                PP: options.pp,
                REPLICATE: options.dp_replicate,
                SHARD: options.dp_shard,
                EP: options.ep,
            }
        )
        self._mesh({PP: options.pp, REPLICATE: options.dp_replicate, WEIGHTS: options.num_shards})
        self._mesh({PP: options.pp, DATA: options.num_replicas})
        num_groups = self.world // options.ep
        self._mesh({"others": num_groups, BETWEEN: options.ep // per_node, WITHIN: per_node})
        if options.is_overlapped:
            self.aside = {axis: self._again(axis) for axis in (WITHIN, BETWEEN)}

    def _mesh(self, sizes: dict[str, int]) -> None:
        names = tuple(sizes)
        made = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=names)
        self.meshes |= {name: made for name in names if name not in self.meshes}
        self.meshes[names[-1]] = made

    def _again(self, axis: str) -> ProcessGroup:
        """Another group of the same ranks, since two passes send at the same time."""
        mesh = self.meshes[axis]
        place = (mesh.mesh_dim_names or ()).index(axis)
        ranks = mesh.mesh.movedim(place, -1).flatten(0, -2).tolist()
        group, _ = dist.new_subgroups_by_enumeration(ranks)
        assert group is not None, "every rank is in one of them"
        return group

    def of(self, axis: str) -> ProcessGroup:
        """The ranks that differ from this one on that axis alone."""
        return self.meshes[axis].get_group(axis)

    def sharding(self, axis: str) -> DeviceMesh:
        """As `fully_shard` takes it: those that share weights, for each replica."""
        mesh = self.meshes[axis]
        return mesh[axis] if self.options.dp_replicate == 1 else mesh[REPLICATE, axis]
