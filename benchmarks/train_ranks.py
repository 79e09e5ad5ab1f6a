"""Two ranks that share the weights (dp_shard 2) beside one rank, in tokens a second.

One rank is measured while a second one that knows nothing of it keeps another core busy, so that
both sides have the same machine. Rounds are interleaved; the median of their ratios counts. The
model and the batch of a rank are those of train_cpu.py, float32, MTP off, one thread a rank.

    python -m benchmarks.train_ranks               # about three minutes
    python -m benchmarks.train_ranks --rounds 1 --steps 2 --zero 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from benchmarks.train_cpu import BATCH, LENGTH, config

WARM_UP_STEPS = 1


def measure(rank: int, world: int, store: str, result: Path, steps: int, zero: int) -> None:
    """Tokens a second of all ranks of this group."""
    import torch
    import torch.distributed as dist

    from rorqual.model import build
    from rorqual.parallel.launch import Launch
    from rorqual.parallel.ranks import joined
    from rorqual.parallel.settings import ParallelSettings
    from rorqual.train.loss import TrainingModel
    from rorqual.train.optimizer import AdamW, OptimizerSettings
    from rorqual.train.ranks import OneRank
    from rorqual.train.step import InTurn, Stepper, StepValues

    torch.set_num_threads(1)
    options, cpu = ParallelSettings(dp_shard=world, zero=zero), torch.device("cpu")
    launch = Launch(rank, world, rank, world)
    group = nullcontext(OneRank())
    if world > 1:
        group = joined(options, cpu, launch, dist.FileStore(store, world))
    with group as ranks:
        model = build(config(0)).train()
        root = TrainingModel(model)
        spread = ranks.spread(model, [root])
        optimizer = AdamW(model, OptimizerSettings())
        stepper = Stepper(
            model,
            optimizer,
            InTurn(model, root, spread=spread),
            micro_batch_size=BATCH,
            ranks=ranks,
        )
        tokens_BS = torch.randint(0, 8192, (BATCH, LENGTH + 1))
        mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        for number in range(WARM_UP_STEPS + steps):
            if number == WARM_UP_STEPS:
                ranks.agree(0)
                start = time.perf_counter()
            stepper.step(tokens_BS, mask_BS, StepValues(1e-4, 0.0, 1e-4, 1e-3))
        seconds = time.perf_counter() - start
    result.write_text(json.dumps(world * steps * BATCH * LENGTH / seconds))


def tokens_per_second(worlds: list[int], steps: int, zero: int) -> list[float]:
    """Of groups that run at the same time."""
    with tempfile.TemporaryDirectory() as place:
        folder, programs, results = Path(place), [], []
        for group, world in enumerate(worlds):
            results.append(folder / f"{group}-0.json")
            for rank in range(world):
                given = [rank, world, folder / f"store-{group}", folder / f"{group}-{rank}.json"]
                command = [sys.executable, "-m", "benchmarks.train_ranks", "--rank"]
                options = ["--steps", str(steps), "--zero", str(zero)]
                programs.append(subprocess.Popen([*command, *map(str, given), *options]))
        for program in programs:
            assert program.wait() == 0
        return [json.loads(result.read_text()) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--zero", type=int, default=1, choices=[1, 3])
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank, world, store, result = options.rank
        measure(int(rank), int(world), store, Path(result), options.steps, options.zero)
        return
    ratios = []
    for _ in range(options.rounds):
        alone = statistics.mean(tokens_per_second([1, 1], options.steps, options.zero))
        (shared,) = tokens_per_second([2], options.steps, options.zero)
        ratios.append(shared / (2 * alone))
        print(f"one rank {alone:,.0f}, two {shared:,.0f} tokens/s: {ratios[-1]:.2f} of twice one")
    print(f"median {statistics.median(ratios):.2f} (bar 0.85)")


if __name__ == "__main__":
    main()
