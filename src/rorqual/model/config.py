"""The model's shape: Hugging Face's `deepseek_v3` field names and what derives from them.

Source: the released config.json (report §4.2). `architectures` decides what a config is,
since R1, Moonlight and Kimi-K2 name `DeepseekV3ForCausalLM` under model types of their own. Both
spellings of the rope fields are read (`rope_theta` + `rope_scaling`, and transformers 5's
`rope_parameters`); the first is written, being what every engine reads. `config_keys` says what
becomes of other keys.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from rorqual.config import fill, settings
from rorqual.errors import ConfigError
from rorqual.model.config_keys import (
    INERT_KEYS,
    LAYER_LISTS,
    MATHEMATICS,
    OTHER_SOFTWARE,
    ROPE_MATHEMATICS,
    other_model,
    refuse_misspelt,
    refuse_other_layers,
    refuse_other_mathematics,
)

ARCHITECTURES = {"DeepseekV3ForCausalLM": "sigmoid", "DeepseekV2ForCausalLM": "softmax"}

# Keys that are read beside the fields of ModelConfig and of YarnScaling.
_OTHER_KEYS = ("architectures", "model_type", "rope_parameters", "num_mtp_layers", "torch_dtype")
_ROPE_TABLES = ("rope_scaling", "rope_parameters")
_ROPE_KEYS = ("type", "rope_type", "rope_theta", "attention_factor")


@settings
class YarnScaling:
    """YaRN (report §4.3; arXiv 2309.00071): `factor` is s, the betas count rotations."""

    factor: float = Field(gt=0)
    """How many times the context grows (s)."""
    original_max_position_embeddings: int = Field(gt=0)
    """The context that was trained before."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Widths that turn at least this often in the old context stay as they are."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Widths that turn at most this often are stretched by `factor`."""
    mscale: float = Field(default=1.0, ge=0)
    """Weight of ln s in the length of cos and sin, against `mscale_all_dim`."""
    mscale_all_dim: float = Field(default=0.0, ge=0)
    """Weight of ln s in the attention's temperature; 0: none."""

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
    """Rows of the embedding: at least the tokenizer's ids."""
    hidden_size: int = Field(gt=0)
    """Width of the stream from layer to layer."""
    intermediate_size: int = Field(gt=0)
    """Width inside a dense layer's feed-forward part."""
    moe_intermediate_size: int = Field(gt=0)
    """Width inside one expert."""
    num_hidden_layers: int = Field(gt=0)
    """Layers of the main model, dense ones included, MTP modules not."""
    num_attention_heads: int = Field(gt=0)
    """Heads of attention."""
    n_routed_experts: int = Field(gt=0)
    """Routed experts of a sparse layer; a multiple of `n_group`."""
    num_experts_per_tok: int = Field(gt=0)
    """Routed experts that a token visits."""
    n_shared_experts: int | None = Field(default=1, ge=0)
    """Experts that every token visits, as one wide one."""
    first_k_dense_replace: int = Field(default=0, ge=0)
    """The first layers, which are dense."""
    n_group: int = Field(default=1, gt=0)
    """Groups of experts, nodes in the report (§2.1.2)."""
    topk_group: int = Field(default=1, gt=0)
    """Groups that a token may visit; at most `n_group`."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """The router's scores: V3's sigmoid (with `noaux_tc`) or V2's softmax (with the others)."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """How experts are chosen: by groups with a bias (V3), by groups, or among all."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are made to sum to 1."""
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    """A factor on what the routed experts give."""
    q_lora_rank: int | None = Field(default=None, gt=0)
    """Width of the queries' latent; none: queries are made directly."""
    kv_lora_rank: int = Field(gt=0)
    """Width of the latent that is cached for keys and values (§2.1.1)."""
    qk_nope_head_dim: int = Field(gt=0)
    """Width of a head's query and key without position."""
    qk_rope_head_dim: int = Field(gt=0)
    """Width of the rotary part, whose key all heads share; even."""
    v_head_dim: int = Field(gt=0)
    """Width of a head's value."""
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    """MTP depth: tokens beyond the next one, each predicted by a module of its own (§2.2)."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Under the root of every norm."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary angles."""
    rope_scaling: YarnScaling | None = None
    """YaRN for a longer context (§4.3); left out, rope as it is."""
    max_position_embeddings: int = Field(default=4096, gt=0)
    """The context in tokens."""
    initializer_range: float = Field(default=0.006, gt=0)
    """Standard deviation of fresh weights."""
    tie_word_embeddings: bool = False
    """Whether embedding and head are one matrix."""

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

    @property
    def sparse_layer_ids(self) -> list[int]:
        return [i for i in range(self.num_layers_with_mtp) if self.is_moe_layer(i)]

    def with_changes(self, **changes: Any) -> ModelConfig:
        return replace(self, **changes)

    @classmethod
    def from_hf(cls, table: dict[str, Any], where: object = None) -> ModelConfig:
        """Reads a `config.json` object; ConfigError names a key that it cannot take."""
        scoring = _scoring_of(table, where)
        known = set(cls.__dataclass_fields__)
        refuse_misspelt(table, known | set(_OTHER_KEYS), where)
        refuse_other_mathematics(table, where)
        values = {key: table[key] for key in known & set(table)}
        if values.get("num_nextn_predict_layers") is None and "num_mtp_layers" in table:
            values["num_nextn_predict_layers"] = table["num_mtp_layers"]
        values.setdefault("scoring_func", scoring)
        is_v3 = values["scoring_func"] == "sigmoid"
        values.setdefault("topk_method", "noaux_tc" if is_v3 else "greedy")
        values.setdefault("norm_topk_prob", is_v3)  # V2's own code leaves the weights as they are
        for key in ("n_group", "topk_group", "first_k_dense_replace", "num_nextn_predict_layers"):
            if values.get(key, 0) is None:
                del values[key]
        if values.get("q_lora_rank") == 0:  # the demo's spelling of None
            values["q_lora_rank"] = None
        values |= _rope_fields(table, where)
        config = fill(cls, values, where, is_foreign=True)
        refuse_other_layers(table, config.first_k_dense_replace, where)
        return config

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
    title = other_model(names, table.get("model_type"))
    raise ConfigError(
        "this is not a DeepSeek-V3-architecture model" + (f": {title}" if title else ""),
        where=where,
        found=f"architectures {names or None}, model_type {table.get('model_type')!r}",
        expected="architectures naming " + " or ".join(ARCHITECTURES),
        fix=OTHER_SOFTWARE,
    )


def unknown_keys(table: dict[str, Any]) -> list[str]:
    """The keys of a `config.json` that are accepted and mean nothing here."""
    known = set(ModelConfig.__dataclass_fields__) | INERT_KEYS | set(MATHEMATICS)
    found = sorted(set(table) - known - set(LAYER_LISTS))
    rope_known = {*YarnScaling.__dataclass_fields__, *_ROPE_KEYS, *ROPE_MATHEMATICS}
    for name in _ROPE_TABLES:
        inner = table.get(name)
        if isinstance(inner, dict):
            found += [f"{name}.{key}" for key in sorted(set(inner) - rope_known)]
    return found


def _rope_fields(table: dict[str, Any], where: object) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either spelling; both may stand there if they agree."""
    places = {name: table[name] for name in _ROPE_TABLES if table.get(name) not in (None, {})}
    scalings = [_yarn_of(name, places[name], table, where) for name in places]
    given = [place.get("rope_theta") for place in (table, *places.values())]
    thetas = [theta for theta in given if theta is not None]
    tables = list(places.values())
    for names, values, shown in ((["rope_theta"], thetas, thetas), (places, scalings, tables)):
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"the values of {' and '.join(names)} contradict each other",
                where=where,
                found=" and ".join(map(str, shown)),
                fix="remove the one that the model was not trained with",
            )
    scaling = scalings[0] if scalings else None
    theta = {"rope_theta": thetas[0]} if thetas else {}
    return {**theta, "rope_scaling": None if scaling is None else asdict(scaling)}


def _yarn_of(name: str, scaling: Any, table: dict[str, Any], where: object) -> YarnScaling | None:
    """What `rope_scaling` or `rope_parameters` says; None for rope as it is."""
    if not isinstance(scaling, dict):
        raise ConfigError(f"{name} is not an object", where=where, found=scaling)
    known = set(YarnScaling.__dataclass_fields__)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if any(isinstance(value, dict) for value in scaling.values()):
        kind = "one for each kind of layer"
    if kind not in ("yarn", "default"):
        raise ConfigError(
            f"rope type {kind!r} is not supported",
            where=where,
            expected="yarn or default",
            fix=OTHER_SOFTWARE,
        )
    refuse_misspelt(scaling, {*known, *_ROPE_KEYS}, where, f"{name}.")
    refuse_other_mathematics(scaling, where, ROPE_MATHEMATICS, f"{name}.")
    if kind == "default":
        return None
    values = {key: scaling[key] for key in known & set(scaling) if scaling[key] is not None}
    if "original_max_position_embeddings" not in values and "max_position_embeddings" in table:
        values["original_max_position_embeddings"] = table["max_position_embeddings"]
    yarn = fill(YarnScaling, values, where, is_foreign=True)
    factor = scaling.get("attention_factor")
    if factor is not None and not _is_near(factor, yarn.rope_magnitude):
        raise ConfigError(
            f"{name}.attention_factor is not supported with this value",
            where=where,
            found=factor,
            expected=f"null or {yarn.rope_magnitude:g}, which mscale and mscale_all_dim give",
            fix=OTHER_SOFTWARE,
        )
    return yarn


def _is_near(found: object, expected: float) -> bool:
    return isinstance(found, (int, float)) and math.isclose(found, expected, rel_tol=1e-6)
