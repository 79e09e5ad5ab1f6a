"""Prometheus metrics: what the engine counts, read at each scrape, and times measured here.

Every series exists from the first scrape on, at zero; no ratio is ever NaN or negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rorqual.engine import EngineStats

TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
EndReason = Literal["stop", "length", "cancelled", "refused", "failed", "closed"]
"""cancelled: nobody wants it any more (the client left or reads nothing, a batch was cancelled).
refused: it never began. failed: the engine's fault, or the time limit. closed: the server's end.
"""
STATUSES = (
    "200",
    "400",
    "401",
    "403",
    "404",
    "405",
    "408",
    "413",
    "422",
    "429",
    "500",
    "503",
    "504",
)
PREFIX = "rorqual_"


class Metrics:
    """One registry per server, so that several can live in a process."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(EngineCollector(stats))
        self._ttft = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From a request's arrival to the first token of an answer.",
            buckets=TTFT_SECONDS,
            registry=self.registry,
        )
        self._inter_token = Histogram(
            PREFIX + "inter_token_seconds",
            "Between two tokens of an answer; tokens of one step share its time.",
            buckets=INTER_TOKEN_SECONDS,
            registry=self.registry,
        )
        self._answers = Counter(
            PREFIX + "answers", "Answers by how they ended.", ["reason"], registry=self.registry
        )
        self._responses = Counter(
            PREFIX + "http_responses", "Responses by status.", ["status"], registry=self.registry
        )
        self._decode_seconds, self._num_decoded = 0.0, 0
        self._disconnects = Counter(
            PREFIX + "client_disconnects",
            "Clients that left before their answer was complete.",
            registry=self.registry,
        )
        self._in_flight = Gauge(
            PREFIX + "http_requests_in_flight",
            "Requests that have not got their whole response.",
            registry=self.registry,
        )
        for reason in get_args(EndReason):
            self._answers.labels(reason)
        for status in STATUSES:
            self._responses.labels(status)

    def note_piece(self, seconds: float, num_tokens: int, is_first: bool) -> None:
        """A piece came, so long after the one before (or after the request)."""
        if is_first:
            self._ttft.observe(max(seconds, 0.0))
            return
        self._decode_seconds += max(seconds, 0.0)
        self._num_decoded += num_tokens
        for _ in range(num_tokens):
            self._inter_token.observe(max(seconds, 0.0) / num_tokens)

    @property
    def tokens_a_second(self) -> float | None:
        """Of one answer, on average since the start, without the wait for its first token."""
        return self._num_decoded / self._decode_seconds if self._decode_seconds else None

    def note_end(self, reason: EndReason) -> None:
        self._answers.labels(reason).inc()

    def note_response(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def note_disconnect(self) -> None:
        self._disconnects.inc()

    def note_in_flight(self, num_requests: int) -> None:
        self._in_flight.set(num_requests)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's own counters, asked for when somebody looks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        used = stats.num_blocks - stats.num_free_blocks
        yield _gauge("requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield _gauge("requests_running", "Requests being answered.", stats.num_running)
        yield _gauge("cache_blocks", "Blocks of the latent cache.", stats.num_blocks)
        yield _gauge("cache_blocks_free", "Blocks that no answer holds.", stats.num_free_blocks)
        yield _gauge("cache_usage_ratio", "Share of blocks held.", _ratio(used, stats.num_blocks))
        queried, hit = stats.num_prefix_queried_tokens, stats.num_prefix_hit_tokens
        yield _counter("prefix_cache_queried_tokens", "Prompt tokens looked up.", queried)
        yield _counter("prefix_cache_hit_tokens", "Prompt tokens found in the cache.", hit)
        yield _gauge("prefix_cache_hit_ratio", "Share of tokens found.", _ratio(hit, queried))
        yield _counter("prompt_tokens", "Tokens of prompts.", stats.num_prompt_tokens)
        yield _counter("output_tokens", "Tokens of answers.", stats.num_output_tokens)
        yield _counter("preemptions", "Answers set back for room.", stats.num_preemptions)
        yield _gauge("draft_length", "MTP drafts for each answer now.", stats.num_drafts)
        yield from _speculation(stats.drafted, stats.accepted)


def _speculation(drafted: Sequence[int], accepted: Sequence[int]) -> Iterable[Metric]:
    """Drafts by position; position 1 is shown even without speculation, so none is empty."""
    drafts = CounterMetricFamily(
        PREFIX + "drafted_tokens", "MTP drafts by position.", labels=["position"]
    )
    hits = CounterMetricFamily(
        PREFIX + "accepted_tokens", "MTP drafts accepted.", labels=["position"]
    )
    shares = GaugeMetricFamily(
        PREFIX + "acceptance_ratio", "Share of drafts accepted.", labels=["position"]
    )
    pairs = list(zip(drafted, accepted, strict=True)) or [(0, 0)]
    for position, (num_drafted, num_accepted) in enumerate(pairs, 1):
        drafts.add_metric([str(position)], num_drafted)
        hits.add_metric([str(position)], num_accepted)
        shares.add_metric([str(position)], _ratio(num_accepted, num_drafted))
    yield from (drafts, hits, shares)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, help, value=max(value, 0))


def _counter(name: str, help: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, help, value=max(value, 0))


def _ratio(part: float, whole: float) -> float:
    """A share from 0 to 1; 0 of nothing."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
