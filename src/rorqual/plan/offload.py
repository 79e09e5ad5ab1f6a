"""A model that is larger than the memory: what llama.cpp's memory map reads from the disk.

What fits stays in memory: first what each token uses (attention, dense and shared experts, head),
then routed experts, each as likely as another. A step reads the rest that it uses. A real cache
keeps the last used pages, not the best, so this is the least that is read.
"""

from __future__ import annotations

from rorqual.model import ModelConfig
from rorqual.model.flops import distinct_experts
from rorqual.plan.hardware import Hardware
from rorqual.plan.memory import memory_of
from rorqual.plan.sizes import Runs, embedding_bytes, expert_bytes, memory_bytes
from rorqual.plan.wish import Wish


def room_for_weights(wish: Wish, hardware: Hardware) -> float:
    """Bytes that cache, activations and workspace leave; below 0 if even they do not fit."""
    memory = memory_of(wish, hardware)
    return hardware.usable_bytes - (memory.total - memory.weights)


def disk_reads(config: ModelConfig, weights: str | Runs, num_tokens: int, room: float) -> float:
    """Bytes that a step of `num_tokens` reads from the disk. Of the embedding it is a few rows."""
    num_sparse = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    routed = num_sparse * config.n_routed_experts * expert_bytes(config, weights)
    always = memory_bytes(config, weights) - routed - embedding_bytes(config, weights)
    share = distinct_experts(config, num_tokens) / config.n_routed_experts
    missing = max(0.0, routed - max(0.0, room - always))
    return max(0.0, always - room) + share * missing
