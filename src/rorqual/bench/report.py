"""What was measured, by row and round, and what it comes to: medians, spread, shares of the limit.

A share is taken in each round, of the limit in that round: the read rate of memory moves within
minutes, so it is measured before and after every engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

from rorqual.bench.figures import RATE, STREAMS, Figure
from rorqual.bench.weights import Form
from rorqual.ops.ceilings import GemmRate, ReadRate

SCHEMA = 1
ORDER = (
    "load",
    "start",
    "first_token",
    "prefill",
    "known_prefix",
    "decode",
    "outside",
    "memory",
    "own_memory",
)


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    min: float
    max: float
    quartiles: tuple[float, float]

    @staticmethod
    def of(values: list[float]) -> Spread:
        cuts = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return Spread(median(values), min(values), max(values), (cuts[0], cuts[2]))


@dataclass
class Row:
    """One figure of one engine: a value a round, and where there is a limit the share of it."""

    engine: str
    figure: Figure  # the last round's
    values: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    bounds: list[str] = field(default_factory=list)

    @property
    def value(self) -> Spread:
        return Spread.of(self.values)

    @property
    def share(self) -> Spread | None:
        if not self.limits:
            return None
        return Spread.of([v / limit for v, limit in zip(self.values, self.limits, strict=True)])

    @property
    def bound(self) -> str:
        """What limited most rounds."""
        return max(set(self.bounds), key=self.bounds.count) if self.bounds else ""

    def as_dict(self) -> dict[str, Any]:
        figure, share = self.figure, self.share
        return {
            "engine": self.engine,
            "what": figure.what,
            "num_tokens": figure.num_tokens,
            "num_streams": figure.num_streams,
            "unit": figure.unit,
            "values": self.values,
            **asdict(self.value),
            "share": None if share is None else asdict(share),
            "limits": self.limits,
            "bound": self.bound,
            "work": None if figure.work is None else asdict(figure.work),
        }


@dataclass
class Report:
    """Everything that a benchmark found so far. `about` says what was asked, and of what."""

    about: dict[str, Any] = field(default_factory=dict)
    reads: list[ReadRate] = field(default_factory=list)
    gemms: list[list[GemmRate]] = field(default_factory=list)
    rows: dict[tuple[str, tuple[str, int, int]], Row] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_complete: bool = False

    def add_machine(self, read: ReadRate, gemms: Iterable[GemmRate]) -> None:
        self.reads.append(read)
        if found := list(gemms):
            self.gemms.append(found)

    def add(self, engine: str, figures: Iterable[Figure], read_rate: float) -> None:
        """An engine's figures of a round, beside the read rate that was measured with them."""
        rates = self.best_gemms()
        for figure in figures:
            row = self.rows.setdefault((engine, figure.key), Row(engine, figure))
            row.figure = figure
            row.values.append(figure.value)
            if figure.work is not None and rates:
                limit, bound = figure.work.limit(read_rate, rates)
                row.limits.append(limit)
                row.bounds.append(bound)

    def best_gemms(self) -> dict[str, float]:
        """By operands, the fastest product of any implementation and shape, in the last round that
        measured them.
        """
        best: dict[str, float] = {}
        for rate in self.gemms[-1] if self.gemms else []:
            best[rate.operands] = max(rate.flops, best.get(rate.operands, 0.0))
        return best

    def ordered(self) -> list[Row]:
        """Rows of one kind beside each other, engines in the order in which they came."""
        engines = list(dict.fromkeys(engine for engine, _ in self.rows))

        def place(row: Row) -> tuple[int, int, int, int]:
            figure = row.figure
            num_streams = figure.num_streams if figure.what in STREAMS else 0
            sizes = figure.num_tokens, num_streams
            return ORDER.index(figure.what), *sizes, engines.index(row.engine)

        return sorted(self.rows.values(), key=place)

    def gemm_table(self) -> list[dict[str, Any]]:
        """The median of the rounds, an implementation and shape."""
        found: dict[tuple[str, str, tuple[int, int, int]], list[float]] = {}
        for rate in (rate for rates in self.gemms for rate in rates):
            found.setdefault((rate.kernels, rate.operands, rate.shape), []).append(rate.flops)
        return [
            {"kernels": kernels, "operands": operands, "shape": list(shape), "flops": median(flops)}
            for (kernels, operands, shape), flops in found.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **self.about,
            "is_complete": self.is_complete,
            "ceilings": {
                "read": {
                    "best": asdict(Spread.of([r.best for r in self.reads])),
                    "median": asdict(Spread.of([r.median for r in self.reads])),
                    "values": [r.best for r in self.reads],
                }
                if self.reads
                else None,
                "gemm": self.gemm_table(),
            },
            "forms": {engine: asdict(form) for engine, form in self.forms.items()},
            "rows": [row.as_dict() for row in self.ordered()],
            "missing": self.missing,
            "notes": self.notes,
        }


def rates_of(report: Report, what: str) -> dict[str, list[Row]]:
    """Rows in tokens a second of that kind, by engine."""
    found: dict[str, list[Row]] = {}
    for row in report.ordered():
        if row.figure.what == what and row.figure.unit == RATE:
            found.setdefault(row.engine, []).append(row)
    return found
