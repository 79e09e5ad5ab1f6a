"""What is written and said of a run as it goes on: metrics.jsonl, plots, lines on the terminal."""

# L sparse layers, E experts

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from rorqual.files import write_json
from rorqual.runs import TIMELINE
from rorqual.train.batches import Measurement
from rorqual.train.checkpoint import Progress
from rorqual.train.learner import StepMade
from rorqual.train.meters import Meters
from rorqual.train.metrics import METRICS, MetricsLog
from rorqual.train.plots import write_plots
from rorqual.train.recipe import Recipe
from rorqual.train.report import Report
from rorqual.train.router_bias import max_violation
from rorqual.train.spikes import Skip
from rorqual.train.tensorboard import FOLDER, TensorBoardLog

SECONDS_BETWEEN_PLOTS = 30.0


class NoRecorder:
    """What a rank writes and says that is not the first: nothing."""

    def __enter__(self) -> NoRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def say(self, lines: Iterable[str]) -> None:
        pass

    def step(self, progress: Progress, made: StepMade) -> None:
        pass

    def validation(self, progress: Progress, found: Measurement) -> None:
        pass

    def load(self, progress: Progress) -> None:
        pass

    def plots(self, is_last: bool) -> None:
        pass

    def resume(self, progress: Progress) -> None:
        pass

    def rollback(self, kept: Progress, skip: Skip, meters: Meters) -> None:
        pass


class Recorder:
    """One run's records; a context in which the progress bar is shown."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        begun: Progress,
        meters: Meters,
        is_quiet: bool,
    ) -> None:
        self.folder, self.meters = folder, meters
        self.has_tensorboard = recipe.metrics.tensorboard
        self.metrics = self._log(begun)
        self.load_every = recipe.metrics.load_every(recipe.training.total_tokens)
        self.load_tokens = begun.tokens
        self.report = Report(recipe.training.total_tokens, begun.tokens, is_quiet)
        self.loads_LE: Tensor | None = None
        self.last_plot = time.monotonic()

    def __enter__(self) -> Recorder:
        self.report.__enter__()
        if (peak := self.meters.peak) is not None:
            self.report.line(f"MFU is a share of {peak.flops / 1e9:,.0f} GFLOP/s: {peak.source}")
        return self

    def __exit__(self, *exception: object) -> None:
        self.report.__exit__(None, None, None)
        self.metrics.close()

    def say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.report.line(line)

    def step(self, progress: Progress, made: StepMade) -> None:
        result, values = made.result, made.values
        loads_LE = result.loads_LE
        self.loads_LE = loads_LE if self.loads_LE is None else self.loads_LE + loads_LE
        max_vio_L = max_violation(loads_LE)
        has_layers = max_vio_L.numel() > 0
        self.metrics.write(
            "step",
            progress.step,
            tokens=progress.tokens,
            loss=result.loss,
            main=result.main,
            mtp=result.mtp,
            balance=result.balance,
            lr=values.lr,
            mtp_weight=values.mtp_weight,
            grad_norm=result.grad_norm,
            batch=made.num_sequences,
            targets=result.num_targets,
            tokens_per_second=round(made.tokens_per_second, 1),
            max_vio_mean=float(max_vio_L.mean()) if has_layers else 0.0,
            max_vio_max=float(max_vio_L.max()) if has_layers else 0.0,
            **self.meters.record(made.tokens_per_second),
            **_bytes(made),
            **({"metrics": result.metrics} if result.metrics else {}),
        )
        if made.timeline is not None:
            write_json(self.folder / TIMELINE, made.timeline.with_intervals())
        speed, mfu = made.tokens_per_second, self.meters.mfu(made.tokens_per_second)
        self.report.step(progress.step, progress.tokens, result.main, speed, result.metrics, mfu)
        if progress.tokens // self.load_every > self.load_tokens // self.load_every:
            self.load(progress)

    def validation(self, progress: Progress, found: Measurement) -> None:
        self.meters.laps.lap("validation")
        self.metrics.write("validation", progress.step, tokens=progress.tokens, **found.record())
        self.report.line(f"step {progress.step}: {found}")

    def resume(self, progress: Progress) -> None:
        self.metrics.write("resume", progress.step, tokens=progress.tokens)

    def rollback(self, kept: Progress, skip: Skip, meters: Meters) -> None:
        """The run goes back: later lines go, and one of its own says why."""
        self.metrics.close()
        self.metrics, self.meters = self._log(kept), meters
        self.loads_LE, self.load_tokens = None, kept.tokens
        self.metrics.write(
            "rollback",
            kept.step,
            tokens=kept.tokens,
            from_step=skip.step,
            first_sample=skip.first,
            num_samples=skip.stop - skip.first,
            why=skip.why,
        )

    def _log(self, begun: Progress) -> MetricsLog:
        also = TensorBoardLog(self.folder / FOLDER, begun.step) if self.has_tensorboard else None
        return MetricsLog(self.folder / METRICS, begun.step, also)

    def load(self, progress: Progress) -> None:
        """Each expert's load since the last line of this kind."""
        if self.loads_LE is None:
            return
        max_vio = [round(value, 4) for value in max_violation(self.loads_LE).tolist()]
        loads = self.loads_LE / self.loads_LE.float().mean(-1, keepdim=True).clamp(min=1e-20)
        rows = [[round(value, 3) for value in row] for row in loads.tolist()]
        self.metrics.write(
            "load", progress.step, layers=self.meters.sparse_layers, max_vio=max_vio, load=rows
        )
        self.loads_LE, self.load_tokens = None, progress.tokens

    def plots(self, is_last: bool) -> None:
        self.meters.laps.lap("checkpoint")
        # Choice: plots take a second, so checkpoints in quick succession share one drawing.
        if is_last or time.monotonic() - self.last_plot > SECONDS_BETWEEN_PLOTS:
            write_plots(self.folder / METRICS, self.folder / "plots")
            self.last_plot = time.monotonic()
            self.meters.laps.lap("plots")


def _bytes(made: StepMade) -> dict[str, int]:
    """Where experts are on several ranks."""
    if not any(made.bytes_sent):
        return {}
    within, between = made.bytes_sent
    return {"bytes_within_nodes": within, "bytes_between_nodes": between}
