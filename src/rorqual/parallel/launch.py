"""What torchrun tells a process in its environment; nothing where it was not started by it."""

from __future__ import annotations

import os
from typing import NamedTuple

from rorqual.errors import UsageError


class Launch(NamedTuple):
    """This process among all, and among those of its machine. `restart`: how often torchrun has
    started all of them again.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    restart: int = 0

    @classmethod
    def of_environment(cls) -> Launch:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        told = {name: os.environ.get(name, "") for name in names}
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        restart = int(again) if again.isdigit() else 0
        if told["WORLD_SIZE"] in ("", "1"):
            return cls(restart=restart)
        if not all(value.isdigit() for value in told.values()):
            raise UsageError(
                "the environment does not say which rank this is",
                found=", ".join(f"{name}={value}" for name, value in told.items()),
                expected="four numbers, as torchrun sets them",
                fix="start with torchrun, or unset WORLD_SIZE",
            )
        rank, world, local_rank, local_world = (int(value) for value in told.values())
        return cls(rank, world, local_rank, local_world, restart)
