"""A model's shape as GGUF keys of architecture `deepseek2`, and back.

Source: llama.cpp's conversion/base.py and deepseek.py (written), src/models/deepseek2.cpp and
src/llama-model.cpp (read). Files differ by age: `attention.key_length` is a head's width in old
ones, and the latent's in those with `attn_k_b`, which have `key_length_mla` too; early files of V3
lack the groups of experts.

YaRN: `yarn_log_multiplier` is 0.1 * mscale_all_dim. llama.cpp knows no `mscale` of its own; where
it differs from mscale_all_dim, so that cos and sin are stretched, a key of ours keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.config import fill
from rorqual.errors import CheckpointError, ConfigError
from rorqual.log import logger
from rorqual.model import ModelConfig, YarnScaling
from rorqual.weights.gguf.format import Value, single
from rorqual.weights.gguf.names import ARCHITECTURE

QUANTISATION_VERSION = 2
GET_AGAIN = "get the file again from its source; very old files lack keys and need a new conversion"
SOFTMAX, SIGMOID = 1, 2
YARN_MSCALE = "rope.scaling.rorqual_mscale"
YARN_MULTIPLIER = 0.1

# The files of V3 and R1 of January 2025 have no group keys: their shape tells them.
V3_WIDTH, V3_EXPERTS, V3_GROUPS = 7168, 256, (8, 4)


def metadata_of(config: ModelConfig, file_type: int, *, is_split: bool = True) -> dict[str, Value]:
    """The keys `general.*` and `deepseek2.*`; the tokenizer's are `tokenizer.py`'s."""
    c = config
    # Where every group is kept there are none; llama.cpp stops at such counts.
    groups = (c.n_group, c.topk_group) if c.topk_group < c.n_group else (1, 1)
    keys: dict[str, Value] = {
        "block_count": c.num_layers_with_mtp,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1 if is_split else c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.q_lora_rank": c.q_lora_rank or 0,  # llama.cpp wants the key
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.latent_dim if is_split else c.qk_head_dim,
        "attention.value_length": c.kv_lora_rank if is_split else c.v_head_dim,
        "rope.freq_base": float(c.rope_theta),
        "rope.dimension_count": c.qk_rope_head_dim,
        "vocab_size": c.vocab_size,
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts or 0,
        "expert_group_count": groups[0],
        "expert_group_used_count": groups[1],
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": SIGMOID if c.scoring_func == "sigmoid" else SOFTMAX,
    }
    if is_split:
        keys["attention.key_length_mla"] = c.qk_head_dim
        keys["attention.value_length_mla"] = c.v_head_dim
    if c.num_nextn_predict_layers:
        keys["nextn_predict_layers"] = c.num_nextn_predict_layers
    if c.rope_scaling is not None:
        keys |= _yarn_keys(c.rope_scaling)
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.file_type": file_type,
        "general.quantization_version": QUANTISATION_VERSION,
        **{f"{ARCHITECTURE}.{key}": value for key, value in keys.items()},
    }


def _yarn_keys(yarn: YarnScaling) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        "rope.scaling.yarn_log_multiplier": YARN_MULTIPLIER * yarn.mscale_all_dim,
    }
    if yarn.mscale != yarn.mscale_all_dim:
        keys[YARN_MSCALE] = float(yarn.mscale)
    if not math.isclose(yarn.rope_magnitude, 1.0, rel_tol=1e-6):
        logger(__name__).warning(
            "mscale %s differs from mscale_all_dim %s: llama.cpp has no key for that and would "
            "compute something else; Rorqual reads the file as it is",
            yarn.mscale,
            yarn.mscale_all_dim,
        )
    return keys


def require_deepseek2(metadata: Mapping[str, Value], where: Path) -> None:
    """CheckpointError naming the architecture if it is another one."""
    found = single(metadata, "general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(
            f"architecture {found if isinstance(found, str) else 'unknown'}: "
            "not a DeepSeek-V3-architecture model",
            where=where,
            expected=f"general.architecture {ARCHITECTURE}",
            fix="`rorqual inspect` lists its tensors; to run it, use llama.cpp",
        )


def config_of(
    metadata: Mapping[str, Value], tensor_names: Collection[str], where: Path
) -> ModelConfig:
    """The shape that a file's keys give; CheckpointError for a missing or impossible one."""
    require_deepseek2(metadata, where)
    keys = _Keys(metadata, where)
    num_mtp = keys.integer("nextn_predict_layers", 0)
    rope_width = keys.integer("rope.dimension_count")
    width = keys.integer("attention.key_length_mla", 0) or keys.integer("attention.key_length")
    values: dict[str, Any] = {
        "vocab_size": keys.integer("vocab_size", 0) or _num_tokens(metadata, where),
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count") - num_mtp,
        "num_nextn_predict_layers": num_mtp,
        "num_attention_heads": keys.integer("attention.head_count"),
        "n_routed_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "n_shared_experts": keys.integer("expert_shared_count", 0) or None,
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0),
        "norm_topk_prob": keys.boolean("expert_weights_norm"),
        "routed_scaling_factor": keys.real("expert_weights_scale", 1.0) or 1.0,
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_width,
        "qk_nope_head_dim": width - rope_width,
        "v_head_dim": keys.integer("attention.value_length_mla", 0)
        or keys.integer("attention.value_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "rope_scaling": _yarn_of(keys),
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        **_routing_of(keys, tensor_names),
    }
    try:
        return fill(ModelConfig, values, where, is_foreign=True)
    except ConfigError as problem:
        raise CheckpointError(
            "its keys give an impossible shape", where=where, found=problem.what, fix=GET_AGAIN
        ) from None


def _routing_of(keys: _Keys, tensor_names: Collection[str]) -> dict[str, Any]:
    """Scores and groups. Without the key of the function, a bias tells V3's sigmoid."""
    gating = keys.integer("expert_gating_func", 0)
    if gating == 0:
        gating = SIGMOID if any("exp_probs_b" in name for name in tensor_names) else SOFTMAX
    if gating not in (SOFTMAX, SIGMOID):
        raise keys.fault("expert_gating_func", gating, "1 (softmax) or 2 (sigmoid)")
    groups = keys.integer("expert_group_count", 0), keys.integer("expert_group_used_count", 0)
    if not all(groups):
        is_v3 = (keys.integer("embedding_length"), keys.integer("expert_count"))
        groups = V3_GROUPS if is_v3 == (V3_WIDTH, V3_EXPERTS) else (1, 1)
        if groups == V3_GROUPS:
            logger(__name__).warning(
                "%s: an early file without groups of experts; DeepSeek-V3's (4 of 8) are used",
                keys.where,
            )
    is_sigmoid = gating == SIGMOID
    greedy = "group_limited_greedy" if groups[0] > 1 else "greedy"
    return {
        "scoring_func": "sigmoid" if is_sigmoid else "softmax",
        "topk_method": "noaux_tc" if is_sigmoid else greedy,
        "n_group": groups[0],
        "topk_group": groups[1],
    }


def _yarn_of(keys: _Keys) -> dict[str, Any] | None:
    kind = single(keys.metadata, f"{ARCHITECTURE}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise keys.fault("rope.scaling.type", keys.get("rope.scaling.type"), "yarn or none")
    multiplier = keys.real("rope.scaling.yarn_log_multiplier")
    all_dim = float(f"{multiplier / YARN_MULTIPLIER:.7g}")
    return {
        "factor": keys.real("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 1.0),
        "mscale": keys.real(YARN_MSCALE, all_dim),
        "mscale_all_dim": all_dim,
    }


def _num_tokens(metadata: Mapping[str, Value], where: Path) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(
            f"neither {ARCHITECTURE}.vocab_size nor tokenizer.ggml.tokens is there", where=where
        )
    return len(tokens)


class _Keys:
    """The keys of the architecture, read with their types."""

    def __init__(self, metadata: Mapping[str, Value], where: Path) -> None:
        self.metadata, self.where = metadata, where

    def get(self, key: str, default: Value = None) -> Value:
        return self.metadata.get(f"{ARCHITECTURE}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
            value = value[0].item()  # some writers give a value for each layer
        if type(value) is not int:
            raise self.fault(key, value, "a whole number")
        return value

    def boolean(self, key: str) -> bool:
        """False where the key is missing."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.fault(key, value, "true or false")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fault(key, value, "a number")
        # float32 in the file: the shortest decimal that gives it is what was meant.
        return float(str(np.float32(value)))

    def fault(self, key: str, found: object, expected: str) -> CheckpointError:
        name = f"{ARCHITECTURE}.{key}"
        return CheckpointError(
            f"{name} is missing" if found is None else f"{name} has an impossible value",
            where=self.where,
            found=None if found is None else str(found)[:80],
            expected=expected,
            fix=GET_AGAIN,
        )
