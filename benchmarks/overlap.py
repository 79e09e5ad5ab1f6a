"""How much of the time of experts' transfers hides behind computation, on two processes.

    python -m benchmarks.overlap [--link-ms 4] [--steps 4]

Two ranks share the experts (`ep = 2`) and train with the order `dualpipev` on one pipeline rank
each: pairs of a forward and a backward. The link is slowed: each exchange sleeps in the thread that
makes it. Once the passes of a pair run at the same time, once one after the other; everything else
is the same. Hidden is the part of an exchange during which the other thread is in its pass and not
in an exchange of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rorqual.model import ModelConfig, preset
from rorqual.parallel.dispatch import Hop
from rorqual.parallel.groups import Groups
from rorqual.parallel.ranks import ManyRanks
from rorqual.parallel.runtime import Stage
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.stages import RankStages
from rorqual.train.in_pipeline import InPipeline
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.step import Stepper, StepValues

Interval = tuple[float, float]
NUM_MICRO_BATCHES, MICRO_BATCH, LENGTH = 8, 2, 128
VALUES = StepValues(lr=1e-3, mtp_weight=0.3, balance_alpha=1e-4, bias_update_speed=1e-3)


class Watch:
    """When each thread was in a pass, and when in an exchange."""

    def __init__(self) -> None:
        self.passes: dict[int, list[Interval]] = {}
        self.exchanges: dict[int, list[Interval]] = {}

    def around(self, kind: str, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*args, **options)
        finally:
            own = getattr(self, kind).setdefault(threading.get_ident(), [])
            own.append((start, time.perf_counter()))

    def clear(self) -> None:
        self.passes.clear()
        self.exchanges.clear()

    def hidden(self) -> dict[str, float]:
        """Seconds of exchanges, and of these behind the other thread's computation; the same of
        those of forwards that ran beside a backward.
        """
        main = threading.get_ident()
        found = {"total": 0.0, "hidden": 0.0, "forward": 0.0, "forward_hidden": 0.0}
        for thread, own in self.exchanges.items():
            others = [t for t in self.passes if t != thread]
            busy = [i for t in others for i in _without(self.passes[t], self.exchanges.get(t, []))]
            total = sum(end - start for start, end in own)
            hidden = sum(_common(one, other) for one in own for other in busy)
            found["total"] += total
            found["hidden"] += hidden
            if thread != main:
                found["forward"] += total
                found["forward_hidden"] += hidden
        return found


def _common(one: Interval, other: Interval) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def _without(passes: list[Interval], exchanges: list[Interval]) -> list[Interval]:
    """What is left of passes, of one thread, outside its exchanges."""
    left = []
    for start, end in passes:
        at = start
        for first, last in sorted(exchanges):
            if start <= first and last <= end:
                left.append((at, first))
                at = last
        left.append((at, end))
    return left


def config() -> ModelConfig:
    return preset("tiny").with_changes(
        vocab_size=2048,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        tie_word_embeddings=False,
    )


def stepper_of(groups: Groups, *, is_overlapped: bool) -> Stepper:
    shape = config()
    ranks = ManyRanks(groups)
    stages = ranks.stages(shape, LENGTH)
    assert stages is not None, "dualpipev has stages on one rank too"
    stages = RankStages(stages.placement, stages.shares, stages.group, is_overlapped)
    held = stages.part(shape)
    held.reset_parameters(torch.Generator().manual_seed(0))
    held.train()
    pipeline = InPipeline(held, stages)
    ranks.spread(held, list(pipeline.roots.values()))
    optimizer = AdamW(held, OptimizerSettings())
    return Stepper(held, optimizer, pipeline, micro_batch_size=MICRO_BATCH, ranks=ranks)


def measure(watch: Watch, stepper: Stepper, num_steps: int) -> dict[str, float]:
    """Of one rank; the first step is not counted."""
    width = LENGTH + 1 + 1
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = NUM_MICRO_BATCHES * MICRO_BATCH, width
    tokens_BS = torch.randint(0, 2048, shape, generator=generator)
    losses = []
    seconds = 0.0
    for step in range(num_steps + 1):
        if step == 1:
            watch.clear()
        dist.barrier()
        start = time.perf_counter()
        losses.append(stepper.step(tokens_BS, tokens_BS >= 0, VALUES).loss)
        seconds += (time.perf_counter() - start) * (step > 0)
    return {**watch.hidden(), "seconds": seconds / num_steps, "loss": losses[-1]}


def of_rank(rank: int, store: str, link_seconds: float, num_steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    watch = Watch()
    delay = [0.0]
    exchange, forward, backward = Hop.exchange, Stage.forward_one_chunk, Stage.backward_one_chunk

    def slowed(self: Hop, *args: Any) -> torch.Tensor:
        arrived = exchange(self, *args)
        time.sleep(delay[0])
        return arrived

    patched: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "exchanges": (Hop, "exchange", slowed),
        "forward": (Stage, "forward_one_chunk", forward),
        "backward": (Stage, "backward_one_chunk", backward),
    }
    for kind, (owner, name, run) in patched.items():
        what = "exchanges" if kind == "exchanges" else "passes"

        def timed(self: Any, *args: Any, _run: Any = run, _what: str = what, **options: Any) -> Any:
            return watch.around(_what, partial(_run, self), *args, **options)

        setattr(owner, name, timed)
    options = ParallelSettings(ep=2, order="dualpipev")
    groups = Groups(options, torch.device("cpu"), ranks_per_node=2)
    steppers = {name: stepper_of(groups, is_overlapped=name == "overlapped")
                for name in ("in turn", "overlapped")}  # fmt: skip
    found: dict[str, Any] = {}
    for link in (0.0, link_seconds):
        delay[0] = link
        for name, stepper in steppers.items():
            found[f"{name}, {link * 1000:g} ms"] = measure(watch, stepper, num_steps)
    dist.barrier()
    dist.destroy_process_group()
    return found


def run_both(link_seconds: float, num_steps: int) -> list[dict[str, Any]]:
    """What each rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.overlap", "--rank", str(rank), "--store", store,
                 "--link-ms", str(link_seconds * 1000), "--steps", str(num_steps)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        told = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit("a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link-ms", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--store")
    given = parser.parse_args()
    if given.rank is not None:
        found = of_rank(given.rank, given.store, given.link_ms / 1000, given.steps)
        print(json.dumps(found))
        return
    for rank, found in enumerate(run_both(given.link_ms / 1000, given.steps)):
        for name, figures in found.items():
            share = figures["hidden"] / figures["total"]
            of_forwards = figures["forward_hidden"] / (figures["forward"] or 1)
            print(
                f"rank {rank}, {name}: {figures['seconds']:.3f} s a step, exchanges "
                f"{figures['total'] / given.steps:.3f} s, hidden {share:.1%}; of forwards beside a "
                f"backward {of_forwards:.1%}; loss {figures['loss']:.6f}"
            )


if __name__ == "__main__":
    main()
