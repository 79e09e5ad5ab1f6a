"""What a person sees of a run: a progress bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from rorqual.log import console, short_count

SECONDS_BETWEEN_LINES = 15.0


class Report:
    """A context that shows tokens, loss, tokens a second and the time left.

    Where nobody can read it any more (the terminal was closed, what a pipe led to has ended) it
    falls silent: the run goes on, since its work is worth more than a line that is lost.
    """

    def __init__(self, total_tokens: int, tokens: int, is_quiet: bool = False) -> None:
        self.total_tokens, self.is_quiet = total_tokens, is_quiet
        self.is_bar = console().is_terminal and not is_quiet
        self.first_tokens, self.first_time = tokens, time.monotonic()
        self.last_line = 0.0
        self.bar = Progress(
            TextColumn("{task.fields[tokens]}"),
            BarColumn(),
            TextColumn("step {task.fields[step]}  loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("left {task.fields[left]}"),
            console=console(),
        )
        self.task = self.bar.add_task(
            "train", total=total_tokens, completed=tokens, **_shown("-", "-", "-", "- tok/s", "-")
        )

    def __enter__(self) -> Report:
        if self.is_bar:
            with self._until_unheard():
                self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_bar:
            with self._until_unheard():
                self.bar.stop()

    def step(
        self,
        step: int,
        tokens: int,
        loss: float,
        tokens_per_second: float,
        metrics: Mapping[str, float] | None = None,
        mfu: float | None = None,
    ) -> None:
        """Shows a step that was made; `metrics` are the stage's own figures, `mfu` a share of the
        peak where one is known.
        """
        # The last batch may end a little beyond the total.
        seen = f"{short_count(tokens)}/{short_count(max(tokens, self.total_tokens))}"
        speed = f"{tokens_per_second:,.0f} tok/s"
        if mfu is not None:
            speed += f"  MFU {mfu:.0%}"
        own = (f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        figures = "  ".join([f"{loss:.3f}", *own])
        if self.is_bar:
            shown = _shown(seen, str(step), figures, speed, self._left(tokens))
            with self._until_unheard():
                self.bar.update(self.task, completed=tokens, **shown)
            return
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or tokens >= self.total_tokens:
            self.last_line = now
            loss_text = f"loss {figures}  {speed}"
            self.line(f"step {step}  {seen} tokens  {loss_text}  left {self._left(tokens)}")

    def line(self, text: str) -> None:
        """Shows a message."""
        if not self.is_quiet:
            with self._until_unheard():
                console().print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _until_unheard(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.is_quiet, self.is_bar = True, False

    def _left(self, tokens: int) -> str:
        """Of the tokens that this process made: on a resume those before it took no time here."""
        seconds = (time.monotonic() - self.first_time) / max(tokens - self.first_tokens, 1)
        return duration(max(self.total_tokens - tokens, 0) * seconds)


def duration(seconds: float) -> str:
    """`01:02:03`, and with days before it `2d 01:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock


def _shown(tokens: str, step: str, loss: str, speed: str, left: str) -> dict[str, Any]:
    """The bar's fields."""
    return {"tokens": tokens, "step": step, "loss": loss, "speed": speed, "left": left}
