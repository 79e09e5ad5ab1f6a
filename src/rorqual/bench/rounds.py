"""Rounds: the machine, our engine and each peer in turn, each in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rorqual.bench.figures import Figure, Load
from rorqual.bench.machine import shapes_of
from rorqual.bench.peers import Peer
from rorqual.bench.processes import BenchError, child, run
from rorqual.bench.report import Report
from rorqual.bench.weights import Form, decode_work, prefill_work
from rorqual.engine.cache_formats import CacheDtype
from rorqual.model import ModelConfig
from rorqual.ops.ceilings import GemmRate, ReadRate

OURS = "rorqual"
PEER_STEP_TOKENS = 512  # of a prompt, in llama.cpp's physical batch and ours
PEER_CACHE: tuple[CacheDtype, str] = ("bf16", "bfloat16")  # 2 bytes a value

Tell = Callable[[str, int, int], None]
"""(what runs now, how many processes have ended, of how many)."""


@dataclass
class Bench:
    """What is to be measured. Without a model, the ceilings alone.

    `options` are our engine's, as `EngineOptions` has them. `save` is called with the report
    whenever there is more in it.
    """

    config: ModelConfig
    load: Load
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    peers: Sequence[Peer] = ()
    num_rounds: int = 1
    save: Callable[[Report], None] = lambda report: None
    tell: Tell = lambda name, done, total: None

    def run(self, report: Report) -> None:
        """Fills the report; BenchError where our own engine fails. A peer that fails is told in the
        report, and left out from then on.
        """
        self._done = 0
        peers = list(self.peers)
        for _ in range(self.num_rounds):
            read = self._machine(report, shapes_of(self.config))
            if self.model is None:
                continue
            read = self._measure(report, OURS, self._ours, read)
            for peer in list(peers):
                try:
                    read = self._measure(report, peer.name, partial(self._peer, peer, report), read)
                except BenchError as problem:
                    report.missing[peer.name] = str(problem)
                    peers.remove(peer)
        report.is_complete = True
        self.save(report)

    @property
    def _num_processes(self) -> int:
        engines = 0 if self.model is None else 1 + len(self.peers)
        return self.num_rounds * (1 + 2 * engines)

    def _machine(self, report: Report, shapes: Sequence[tuple[int, int, int]] = ()) -> float:
        """The read rate; products of these shapes go into the report with it."""
        self._tell("the machine")
        asked = child("machine", threads=self.load.threads, shapes=list(shapes))
        found = json.loads(run("the machine's ceilings", asked).out)
        read = ReadRate(**found["read"])
        gemms = [GemmRate(**{**rate, "shape": tuple(rate["shape"])}) for rate in found["gemm"]]
        report.add_machine(read, gemms)
        self._done += 1
        self.save(report)
        return read.best

    def _measure(
        self,
        report: Report,
        name: str,
        measure: Callable[[], tuple[Form, list[Figure]]],
        before: float,
    ) -> float:
        """One engine's round; the read rate after it."""
        self._tell(name)
        form, figures = measure()
        self._done += 1
        after = self._machine(report)
        report.forms[name] = form
        report.add(name, figures, (before + after) / 2)
        self.save(report)
        return after

    def _ours(self) -> tuple[Form, list[Figure]]:
        asked = {"model": self.model, "load": self.load.as_dict(), "options": self.options}
        ended = run(OURS, child("ours", **asked, started=time.time()))
        form, *figures = map(json.loads, ended.out.splitlines())
        return Form(**form), [Figure.of(figure) for figure in figures]

    def _peer(self, peer: Peer, report: Report) -> tuple[Form, list[Figure]]:
        return peer.form, [self._with_work(f, peer.form, report) for f in peer.measure(self.load)]

    def _with_work(self, figure: Figure, form: Form, report: Report) -> Figure:
        """A peer's figure with what it must do at least: experts as ours counted them, latents in
        two bytes a value.
        """
        if figure.what == "prefill":
            work = prefill_work(self.config, form, figure.num_tokens, PEER_STEP_TOKENS)
            return replace(figure, work=work)
        if figure.what != "decode":
            return figure
        counted = report.rows.get((OURS, figure.key))
        experts = counted.figure.work.experts if counted and counted.figure.work else None
        cached = figure.num_streams * (figure.num_tokens + self.load.decode_tokens / 2)
        streams = figure.num_streams
        work = decode_work(self.config, form, streams, cached, PEER_CACHE, experts)
        return replace(figure, work=work)

    def _tell(self, name: str) -> None:
        self.tell(name, self._done, self._num_processes)
