"""One rank of a training run of seconds that may kill itself, for test_ranks_die.py.

python many_run.py RUN_FOLDER OVERRIDES KILLS

OVERRIDES is a JSON list of `a.b=c`. KILLS is a JSON list of [rank, where, how many times it came
there], one for each start of all ranks, of which torchrun (or the test) tells the number:
`update` is between the weights' and the router bias's update, `write` before a rank's shard,
`finish` when all are written and the folder has no name yet, `point` when it has, and `latest`
points to the one before.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from small_run import RECIPE, STAGES, SyntheticBatches

from rorqual.cli.ranks import joined_ranks
from rorqual.config import apply_overrides
from rorqual.parallel.launch import Launch
from rorqual.train import TrainingData, train
from rorqual.train.recipe import recipe_of


def _kill_at(where: str, times: int) -> None:
    from rorqual.train import router_bias, saver, shards

    places: dict[str, tuple[Any, str]] = {
        "update": (router_bias, "update_bias"),
        "write": (shards, "save_file"),
        "finish": (saver, "replace_directory"),
        "point": (saver.Saver, "_point_to"),
    }
    calls = 0
    target, name = places[where]
    original = getattr(target, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(target, name, counted)


def main() -> None:
    folder, overrides, kills = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    launch = Launch.of_environment()
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if start < len(kills) and kills[start][0] == launch.rank:
        _kill_at(*kills[start][1:])
    pids = folder.parent / "pids"
    pids.mkdir(parents=True, exist_ok=True)
    (pids / f"{start}-{launch.rank}").write_text(str(os.getpid()))
    recipe = recipe_of(apply_overrides(copy.deepcopy(RECIPE), overrides), STAGES)
    data = TrainingData(train=SyntheticBatches())
    with joined_ranks(recipe.parallel, torch.device("cpu"), launch) as ranks:
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        train(recipe, folder, data, device="cpu", is_quiet=True, ranks=ranks)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
