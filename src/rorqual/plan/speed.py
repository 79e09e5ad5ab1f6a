"""Tokens a second that bandwidth and FLOPs allow: the roofline, not a promise.

A decode step reads every weight that any of its tokens uses, and the streams' caches; it does two
FLOPs a weight a token. Of E routed experts, B independent tokens that choose K each meet
E * (1 - (1 - K/E)^B) in expectation, when all are equally likely, as balanced training makes them.
Transfers between devices are not counted: several devices are their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.model import ModelConfig
from rorqual.model.flops import forward_flops_per_token
from rorqual.plan.hardware import Hardware
from rorqual.plan.memory import cache_bytes_per_token
from rorqual.plan.sizes import embedding_bytes, expert_bytes, memory_bytes


@dataclass(frozen=True)
class Speed:
    """Upper limits. `bound` says what the limit is: "bandwidth" or "compute"."""

    prefill_tokens_per_second: float
    prefill_bound: str
    decode_tokens_per_second: float  # all streams together
    decode_tokens_per_second_per_stream: float
    decode_bound: str
    decode_bytes_per_step: float
    distinct_experts_per_layer: float

    def as_dict(self) -> dict[str, float | str]:
        return dict(vars(self))


def distinct_experts(config: ModelConfig, num_tokens: int) -> float:
    """Routed experts of a layer that `num_tokens` independent tokens visit, in expectation."""
    share = config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - (1 - share) ** num_tokens)


def read_bytes(config: ModelConfig, weights: str, num_tokens: int) -> float:
    """Bytes of weights that a step of `num_tokens` reads."""
    num_sparse = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    one = expert_bytes(config, weights)
    routed = num_sparse * config.n_routed_experts * one
    rest = memory_bytes(config, weights) - routed - embedding_bytes(config, weights)
    return rest + num_sparse * distinct_experts(config, num_tokens) * one


def speed_of(
    config: ModelConfig, hardware: Hardware, *, weights: str, kv: str, context: int, batch: int
) -> Speed:
    """Prefill of a prompt of `context` tokens; decode of `batch` streams at that context."""
    flops = hardware.total_flops(_operands(weights))
    bandwidth = hardware.total_bandwidth
    decode_bytes = read_bytes(config, weights, batch)
    decode_bytes += batch * context * cache_bytes_per_token(config, kv)
    decode_flops = batch * forward_flops_per_token(config, context, use_absorbed=True)
    decode_seconds, decode_bound = _slower(decode_bytes / bandwidth, decode_flops / flops)
    step = min(hardware.step_tokens, context)
    prefill_flops = step * forward_flops_per_token(config, (context + 1) / 2)
    prefill_bytes = read_bytes(config, weights, step)
    prefill_seconds, prefill_bound = _slower(prefill_bytes / bandwidth, prefill_flops / flops)
    return Speed(
        step / prefill_seconds,
        prefill_bound,
        batch / decode_seconds,
        1 / decode_seconds,
        decode_bound,
        decode_bytes,
        distinct_experts(config, batch),
    )


def _operands(weights: str) -> str:
    """What products are computed in: GGUF's types are decoded to bfloat16."""
    return weights if weights in ("fp8", "float32") else "bf16"


def _slower(read_seconds: float, compute_seconds: float) -> tuple[float, str]:
    is_reading = read_seconds >= compute_seconds
    return max(read_seconds, compute_seconds), "bandwidth" if is_reading else "compute"
