"""The demo's rank shards, `model{rank}-mp{world}.safetensors`: names, and how a tensor is cut.

Source: the mapping in inference/convert.py and the parallel layers in inference/model.py of
github.com/deepseek-ai/DeepSeek-V3. Rows are cut for the embedding, the head, q_b/q/kv_b, gate and
up; columns for o and down; an expert belongs whole to one rank; all else every rank repeats. Scales
are cut as their weights are. The demo leaves the MTP layer out; asked for, it keeps its place
(`layers.61.`), Hugging Face's names where the demo has none (enorm, hnorm, eh_proj, shared_head).
"""

from __future__ import annotations

import re
from typing import Literal

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.ops.block_fp8 import BLOCK, num_blocks
from rorqual.weights.fp8 import BLOCK_PAIR, SCALE_SUFFIX
from rorqual.weights.planned import Region

Cut = Literal["rows", "columns", "expert", "whole"]

# The part of a name before its last dot: the demo's word for it, and the cut.
WORDS: dict[str, tuple[str, Cut]] = {
    "embed_tokens": ("embed", "rows"),
    "input_layernorm": ("attn_norm", "whole"),
    "post_attention_layernorm": ("ffn_norm", "whole"),
    "q_proj": ("wq", "rows"),
    "q_a_proj": ("wq_a", "whole"),
    "q_a_layernorm": ("q_norm", "whole"),
    "q_b_proj": ("wq_b", "rows"),
    "kv_a_proj_with_mqa": ("wkv_a", "whole"),
    "kv_a_layernorm": ("kv_norm", "whole"),
    "kv_b_proj": ("wkv_b", "rows"),
    "o_proj": ("wo", "columns"),
    "gate": ("gate", "whole"),
    "gate_proj": ("w1", "rows"),
    "down_proj": ("w2", "columns"),
    "up_proj": ("w3", "rows"),
    "norm": ("norm", "whole"),
    "lm_head": ("head", "rows"),
    # MTP, which the demo does not know
    "enorm": ("enorm", "whole"),
    "hnorm": ("hnorm", "whole"),
    "eh_proj": ("eh_proj", "whole"),
    "head": ("head", "rows"),
}
_ROOMS = {"self_attn": "attn", "mlp": "ffn"}
_LAST = {"weight" + SCALE_SUFFIX: "scale", "e_score_correction_bias": "bias"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_OURS = re.compile(r"(embed|norm|head)\.weight|layers\.\d+\.(attn|ffn)(_norm)?\..+")


def shard_file(rank: int, world: int) -> str:
    return f"model{rank}-mp{world}.safetensors"


def rank_of_file(name: str) -> tuple[int, int] | None:
    """(rank, world) of a file name in the demo's form."""
    found = _FILE.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def is_shard_name(name: str) -> bool:
    """A tensor name as the demo writes it."""
    return bool(_OURS.fullmatch(name))


def shard_name(name: str) -> str:
    """The demo's name for a Hugging Face tensor (weight, scale or bias)."""
    *rooms, word, last = name.removeprefix("model.").split(".")
    rooms = [_ROOMS.get(room, room) for room in rooms]
    return ".".join([*rooms, WORDS[word][0], _LAST.get(last, last)])


def cut_of(name: str) -> Cut:
    """How a Hugging Face tensor is divided among ranks."""
    return "expert" if _EXPERT.search(name) else WORDS[name.split(".")[-2]][1]


def expert_of(name: str) -> int | None:
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def region_of(
    name: str, shape: tuple[int, ...], rank: int, world: int, num_experts: int
) -> Region | None:
    """The rank's part of a tensor of this shape, None if it has none. The sizes must divide."""
    cut = cut_of(name)
    if cut == "expert":
        owner = (expert_of(name) or 0) // (num_experts // world)
        return Region((0, shape[0])) if owner == rank else None
    if cut == "whole":
        return Region((0, shape[0]))
    size = shape[0] if cut == "rows" else shape[1]
    assert size % world == 0, f"{name}: {size} {cut} among {world} ranks"
    width = size // world
    span = (rank * width, (rank + 1) * width)
    return Region(span) if cut == "rows" else Region((0, shape[0]), span)


def check_world(config: ModelConfig, world: int, *, is_fp8: bool) -> None:
    """UsageError where the world does not divide the model, or would cut an FP8 block."""
    sizes = _divided_sizes(config)
    unfit = {name: size for name, size in sizes.items() if size % world}
    if unfit or world < 1:
        raise UsageError(
            f"the model cannot be divided among {world} ranks",
            found=", ".join(f"{name} {size:,}" for name, size in unfit.items()) or world,
            expected=f"this many ranks: {_worlds(config, is_fp8=is_fp8)}",
        )
    if is_fp8 and world > 1:
        cut = {n: size for n, size in _fp8_sizes(config).items() if (size // world) % BLOCK}
        if cut:
            name, size = next(iter(cut.items()))
            raise UsageError(
                f"{world} ranks would cut a block of {BLOCK} that shares one FP8 scale",
                found=f"{name}: {size:,} / {world} = {size // world}",
                expected=f"this many ranks for FP8: {_worlds(config, is_fp8=True)}",
                fix=f"ask for bfloat16: --to shards:{world}:bf16",
            )


def _divided_sizes(config: ModelConfig) -> dict[str, int]:
    sizes = {
        "n_routed_experts": config.n_routed_experts,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if config.first_k_dense_replace:
        sizes["intermediate_size"] = config.intermediate_size
    if config.n_shared_experts:
        sizes["shared experts"] = config.n_shared_experts * config.moe_intermediate_size
    return sizes


def _fp8_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes that are cut in FP8 tensors: those of the projections."""
    heads = config.num_attention_heads
    sizes = {
        "queries": heads * config.qk_head_dim,
        "keys and values": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "attention's output": heads * config.v_head_dim,
    }
    return sizes | {n: s for n, s in _divided_sizes(config).items() if n[0] in "is"}


def _worlds(config: ModelConfig, *, is_fp8: bool) -> str:
    sizes, blocks = _divided_sizes(config).values(), _fp8_sizes(config).values()
    worlds = [
        world
        for world in range(1, config.n_routed_experts + 1)
        if not any(size % world for size in sizes)
        and not (is_fp8 and world > 1 and any((size // world) % BLOCK for size in blocks))
    ]
    return ", ".join(map(str, worlds))


def scale_region(region: Region, block: tuple[int, int] = BLOCK_PAIR) -> Region:
    """The blocks of a weight's region, whose cuts lie between blocks."""

    def blocks(span: tuple[int, int], size: int) -> tuple[int, int]:
        return span[0] // size, num_blocks(span[1], size)

    columns = blocks(region.columns, block[1]) if region.columns else None
    return Region(blocks(region.rows, block[0]), columns)
