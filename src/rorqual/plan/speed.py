"""Tokens a second that bandwidth and FLOPs allow: the roofline, not a promise.

A decode step reads every weight that any of its tokens uses, and the streams' caches; it does two
FLOPs a weight a token. Of the routed experts B independent tokens meet as many as chance gives
(`model.flops.distinct_experts`), when all are equally likely, as balanced training makes them.
With N drafts a step verifies N + 1 tokens a stream, after N passes through the MTP layer and the
head; it yields 1 + a + ... + a^N tokens where each draft is accepted with probability a if those
before it were. Several devices are their sum; what they send each other takes its time beside the
work (report §3.4: of two micro-batches one computes while the other is sent), as far as it is known
(`transfers.py`). Of a model that does not fit, the rest is read from the disk (`offload.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rorqual.model import ModelConfig
from rorqual.model.flops import distinct_experts, forward_flops_per_token
from rorqual.plan.hardware import Hardware
from rorqual.plan.offload import disk_reads
from rorqual.plan.sizes import Runs, embedding_bytes, expert_bytes, head_bytes, memory_bytes
from rorqual.plan.transfers import sent
from rorqual.plan.wish import Wish, layer_cache_bytes

ACCEPTANCE = 0.85  # report §5.4.3: 85 to 90 % of the second tokens


@dataclass(frozen=True)
class Speed:
    """Upper limits. `bound` says what the limit is: bandwidth, compute, transfers or disk."""

    prefill_tokens_per_second: float
    prefill_bound: str
    decode_tokens_per_second: float  # all streams together
    decode_tokens_per_second_per_stream: float
    decode_bound: str
    decode_bytes_per_step: float
    tokens_per_step: float  # of a stream: above 1 with drafts
    sent_bytes_per_step: float | None  # by each device in decode; None: its links are not known
    disk_bytes_per_step: float  # read in decode

    def as_dict(self) -> dict[str, float | str | None]:
        return dict(vars(self))


def read_bytes(config: ModelConfig, weights: str | Runs, num_tokens: int) -> float:
    """Bytes of weights that a step of `num_tokens` reads."""
    num_sparse = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    one = expert_bytes(config, weights)
    routed = num_sparse * config.n_routed_experts * one
    rest = memory_bytes(config, weights) - routed - embedding_bytes(config, weights)
    return rest + num_sparse * distinct_experts(config, num_tokens) * one


def draft_bytes(config: ModelConfig, weights: str | Runs, num_tokens: int) -> float:
    """Bytes of weights that one pass of drafting reads: an MTP layer, and the head."""
    own = memory_bytes(config, weights, with_mtp=True) - memory_bytes(config, weights)
    layer = own / config.num_nextn_predict_layers
    unused = config.n_routed_experts - distinct_experts(config, num_tokens)
    return layer - unused * expert_bytes(config, weights) + head_bytes(config, weights)


def tokens_per_step(num_drafts: int, acceptance: float = ACCEPTANCE) -> float:
    return sum(acceptance**i for i in range(num_drafts + 1))


def speed_of(wish: Wish, hardware: Hardware, room: float = math.inf) -> Speed:
    """Prefill of a prompt of the whole context; decode of all streams at that context. `room`:
    bytes of memory for the weights, of which the rest is on the disk.
    """
    config, weights, context, batch = wish.config, wish.runs_as, wish.context, wish.batch
    num_drafts, num_rows = wish.num_drafts, batch * (wish.num_drafts + 1)
    num_sparse = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    latents = batch * context * layer_cache_bytes(config, wish.cache_format)
    decode_bytes = read_bytes(config, weights, num_rows) + config.num_hidden_layers * latents
    decode_flops = num_rows * forward_flops_per_token(config, context, use_absorbed=True)
    if num_drafts:
        decode_bytes += num_drafts * (draft_bytes(config, weights, batch) + latents)
        decode_flops += batch * num_drafts * _draft_flops(config, context)
    decode_sent = sent(config, hardware, num_rows * num_sparse + batch * num_drafts)
    from_disk = disk_reads(config, weights, num_rows, room)
    flops = hardware.total_flops(_operands(wish))
    decode_seconds, decode_bound = _slowest(
        bandwidth=decode_bytes / hardware.total_bandwidth,
        compute=decode_flops / flops,
        transfers=decode_sent.seconds if decode_sent else 0,
        disk=from_disk / hardware.disk_rate,
    )
    step = min(wish.step_tokens(hardware), context)
    prefill_sent = sent(config, hardware, step * num_sparse)
    prefill_seconds, prefill_bound = _slowest(
        bandwidth=read_bytes(config, weights, step) / hardware.total_bandwidth,
        compute=step * forward_flops_per_token(config, (context + 1) / 2) / flops,
        transfers=prefill_sent.seconds if prefill_sent else 0,
        disk=disk_reads(config, weights, step, room) / hardware.disk_rate,
    )
    gained = tokens_per_step(num_drafts)
    return Speed(
        prefill_tokens_per_second=step / prefill_seconds,
        prefill_bound=prefill_bound,
        decode_tokens_per_second=batch * gained / decode_seconds,
        decode_tokens_per_second_per_stream=gained / decode_seconds,
        decode_bound=decode_bound,
        decode_bytes_per_step=decode_bytes,
        tokens_per_step=gained,
        sent_bytes_per_step=decode_sent.to_devices if decode_sent else None,
        disk_bytes_per_step=from_disk,
    )


def _slowest(**seconds: float) -> tuple[float, str]:
    """What takes longest of what goes on at once; the first of equals."""
    bound = max(seconds, key=lambda what: seconds[what])
    return seconds[bound], bound


def _draft_flops(config: ModelConfig, context: int) -> float:
    """Of one token through one MTP layer and the head."""
    both = (
        forward_flops_per_token(config, context, use_absorbed=True, with_mtp=with_mtp)
        for with_mtp in (True, False)
    )
    more, less = both
    return (more - less) / config.num_nextn_predict_layers


def _operands(wish: Wish) -> str:
    """What products are computed in: GGUF's types are decoded, by our engine all that is stored."""
    if wish.itemsize == 4 and not isinstance(wish.runs_as, Runs):
        return "float32"
    return "fp8" if wish.runs_as == "fp8" else "bf16"
