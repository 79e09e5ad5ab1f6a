"""The model's shape: Hugging Face's `deepseek_v3` field names and what derives from them.

Source: SPEC of the released config.json (report §4.2). `architectures` decides what a config is,
since R1, Moonlight and Kimi-K2 name `DeepseekV3ForCausalLM` under model types of their own. Both
spellings of the rope fields are read (`rope_theta` + `rope_scaling`, and transformers 5's
`rope_parameters`); the first is written, being what every engine reads. A key that is neither known
nor known to be without effect is an error.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from rorqual.config import fill, settings
from rorqual.errors import ConfigError

ARCHITECTURES = {"DeepseekV3ForCausalLM": "sigmoid", "DeepseekV2ForCausalLM": "softmax"}

# Keys of released configs that do not change what the model computes.
INERT_KEYS = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype
    eos_token_id ep_size head_dim id2label is_encoder_decoder label2id mlp_bias model_type
    num_key_value_heads output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type qk_head_dim quantization_config return_dict
    rope_interleave seq_aux torch_dtype transformers_version unpadded_vocab_size use_cache
    aux_loss_alpha attention_bias attention_dropout hidden_act moe_layer_freq rope_parameters
    tf_legacy_loss use_bfloat16 num_local_experts num_experts num_mtp_layers
    """.split()
)
# Keys whose other values would change it: what they must be here.
REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "moe_layer_freq": (1, None),
    "rope_interleave": (True, None),
    "is_encoder_decoder": (False, None),
}


@settings
class YarnScaling:
    """YaRN (report §4.3; arXiv 2309.00071): `factor` is s, the betas count rotations."""

    factor: float = Field(gt=0, allow_inf_nan=False)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    beta_slow: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    mscale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    mscale_all_dim: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def softmax_mscale(self) -> float:
        """What each of q and k gains in length: (0.1 * mscale_all_dim * ln s + 1)."""
        return _mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0

    @property
    def rope_magnitude(self) -> float:
        """The factor on cos and sin; 1 where mscale equals mscale_all_dim, as in V2 and V3."""
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@settings
class ModelConfig:
    """A model's shape. Field names are the checkpoint's; None switches a part off."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    n_routed_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    n_shared_experts: int | None = Field(default=1, ge=0)
    first_k_dense_replace: int = Field(default=0, ge=0)
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    q_lora_rank: int | None = Field(default=None, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    rope_theta: float = Field(default=10000.0, gt=0, allow_inf_nan=False)
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = Field(default=4096, gt=0)
    initializer_range: float = Field(default=0.006, gt=0, allow_inf_nan=False)
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} is not a multiple of "
                f"n_group {self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_method == "greedy":
            reachable = self.n_routed_experts
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {reachable} experts "
                "of topk_group groups"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} is odd; rotary pairs need an even width"
            )
        if (self.scoring_func == "sigmoid") != (self.topk_method == "noaux_tc"):
            raise ValueError(
                f"scoring_func {self.scoring_func!r} with topk_method {self.topk_method!r}: "
                "V3 has sigmoid with noaux_tc, V2 has softmax with greedy or group_limited_greedy"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached a token and layer: the normed latent and the shared rotary key (report
        §2.1.1).
        """
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_layers_with_mtp(self) -> int:
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def softmax_scale(self) -> float:
        mscale = self.rope_scaling.softmax_mscale if self.rope_scaling else 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    @property
    def has_correction_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    def is_moe_layer(self, layer_id: int) -> bool:
        """MTP modules, layers from num_hidden_layers on, are always sparse, as released."""
        return layer_id >= self.first_k_dense_replace or layer_id >= self.num_hidden_layers

    def with_changes(self, **changes: Any) -> ModelConfig:
        return replace(self, **changes)

    @classmethod
    def from_hf(cls, table: dict[str, Any], where: object = None) -> ModelConfig:
        """Reads a `config.json` object; ConfigError names the keys it cannot take."""
        scoring = _scoring_of(table, where)
        for key, allowed in REQUIRED_VALUES.items():
            if key in table and table[key] not in allowed:
                raise ConfigError(
                    f"{key} is not supported with this value",
                    where=where,
                    found=table[key],
                    expected=allowed[0],
                )
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(table) - known - INERT_KEYS)
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(known | INERT_KEYS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown keys {', '.join(unknown)}{hint}",
                where=where,
                fix="remove them or correct their spelling",
            )
        values = {key: table[key] for key in known & set(table)}
        if table.get("num_mtp_layers") is not None:
            values.setdefault("num_nextn_predict_layers", table["num_mtp_layers"])
        values.setdefault("scoring_func", scoring)
        values.setdefault(
            "topk_method", "noaux_tc" if values["scoring_func"] == "sigmoid" else "greedy"
        )
        for key in ("n_group", "topk_group", "first_k_dense_replace", "num_nextn_predict_layers"):
            if values.get(key, 0) is None:
                del values[key]
        if values.get("q_lora_rank") == 0:  # the demo's spelling of None
            values["q_lora_rank"] = None
        values |= _rope_fields(table, where)
        return fill(cls, values, where, is_foreign=True)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` object, as transformers and the serving engines read it."""
        table = asdict(self)
        is_v3 = self.scoring_func == "sigmoid"
        if self.rope_scaling is not None:
            table["rope_scaling"] = {"type": "yarn", **asdict(self.rope_scaling)}
        return {
            "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
            **table,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
            "use_cache": True,
        }


def _scoring_of(table: dict[str, Any], where: object) -> str:
    names = table.get("architectures") or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "architectures is not a list of names", where=where, found=names,
            expected='["DeepseekV3ForCausalLM"]',
        )  # fmt: skip
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and table.get("model_type") in ("deepseek_v3", "kimi_k2"):
        return "sigmoid"
    if not names and table.get("model_type") == "deepseek_v2":
        return "softmax"
    raise ConfigError(
        "this is not a DeepSeek-V3-architecture model",
        where=where,
        found=f"architectures {names or None}, model_type {table.get('model_type')!r}",
        expected="architectures naming " + " or ".join(ARCHITECTURES),
    )


def _rope_fields(table: dict[str, Any], where: object) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either spelling."""
    parameters = table.get("rope_parameters")
    scaling = parameters if parameters is not None else table.get("rope_scaling")
    theta = table.get("rope_theta")
    if scaling is None:
        return {} if theta is None else {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(scaling, dict):
        raise ConfigError("the rope scaling is not an object", where=where, found=scaling)
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", theta)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    fields: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind == "default":
        return {**fields, "rope_scaling": None}
    if kind != "yarn":
        raise ConfigError(
            f"rope type {kind!r} is not supported", where=where, expected="yarn or default"
        )
    for key in ("truncate", "attention_factor", "partial_rotary_factor"):
        if scaling.pop(key, None) not in (None, True, 1.0):
            raise ConfigError(f"rope_scaling.{key} is not supported with this value", where=where)
    if "original_max_position_embeddings" not in scaling and "max_position_embeddings" in table:
        scaling["original_max_position_embeddings"] = table["max_position_embeddings"]
    return {**fields, "rope_scaling": scaling}
