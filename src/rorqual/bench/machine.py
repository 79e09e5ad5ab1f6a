"""The machine's ceilings, measured in a process of their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from rorqual.model import ModelConfig
from rorqual.ops.ceilings import gemm_rates, read_rate

PROMPT_ROWS = 512  # a step of prefill


def shapes_of(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the products of a step of prefill, but for the head, which meets
    one row: an expert meets its share of the rows.
    """
    dim, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_width = heads * config.qk_head_dim
    maps = [(dim, config.latent_dim), (heads * config.v_head_dim, dim)]
    maps.append((latent, heads * (config.qk_nope_head_dim + config.v_head_dim)))
    if config.q_lora_rank is None:
        maps.append((dim, q_width))
    else:
        maps += [(dim, config.q_lora_rank), (config.q_lora_rank, q_width)]
    inner = config.moe_intermediate_size
    widths = [inner * config.n_shared_experts] if config.n_shared_experts else []
    widths += [config.intermediate_size] if config.first_k_dense_replace else []
    for width in widths:
        maps += [(dim, width), (width, dim)]
    rows = max(1, PROMPT_ROWS * config.num_experts_per_tok // config.n_routed_experts)
    found = [(PROMPT_ROWS, *pair) for pair in maps]
    found += [(rows, dim, 2 * inner), (rows, inner, dim)]
    return list(dict.fromkeys(found))


def main(asked: dict[str, Any]) -> None:
    """Prints the rates."""
    torch.set_num_threads(asked["threads"])
    rates = [asdict(rate) for rate in gemm_rates([tuple(s) for s in asked["shapes"]])]
    print(json.dumps({"read": asdict(read_rate()), "gemm": rates}))
