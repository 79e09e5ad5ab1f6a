"""Programs that are the ranks of one process group, run to their ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import forked
from patience import HANG_SECONDS


class Rank(forked.Popen):
    """Of one process, which has imported what ranks need besides."""

    modules = (
        *forked.PRELOADED,
        "rorqual.parallel.ranks",
        "rorqual.train.shards",
        "torch.distributed.pipelining",
    )


def run_ranks(program: Path, arguments: Sequence[Sequence[object]]) -> None:
    """Each with arguments of its own; all must end well, and what went wrong is told of all."""
    ranks = [
        Rank([sys.executable, str(program), *map(str, own)], stderr=subprocess.PIPE, text=True)
        for own in arguments
    ]
    try:
        errors = [rank.communicate(timeout=HANG_SECONDS)[1] for rank in ranks]
        assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    finally:
        for rank in ranks:
            rank.kill()
