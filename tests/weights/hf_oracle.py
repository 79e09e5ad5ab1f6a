"""transformers' DeepSeek models with tiny random weights: the oracle of the weights tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.model import DeepseekV3, ModelConfig
from small import SMALL, YARN, randomise, softmax, variants

BASE = SMALL.with_changes(num_nextn_predict_layers=0)
SOFTMAX = softmax(BASE)
# Several whole FP8 blocks: transformers' dequantiser refuses edge blocks where there are several
# (also the 576 rows of the release), so those have a plain twin in test_block_fp8.py.
WIDE = BASE.with_changes(
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=128,
    v_head_dim=64,
)

# Edge blocks in both directions: 576 rows as in the release, 144, 160 and 192 columns.
EDGES = SMALL.with_changes(
    hidden_size=192,
    intermediate_size=160,
    moe_intermediate_size=144,
    num_hidden_layers=2,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
)

# rms_norm_eps stays 1e-6: transformers gives the norms inside MLA that value always.
CONFIGS: dict[str, ModelConfig] = {
    **variants(BASE),
    "mtp": SMALL,
    "mtp_groups_yarn": SMALL.with_changes(n_group=2, topk_group=1, rope_scaling=YARN),
    "tied_mtp": SMALL.with_changes(tie_word_embeddings=True),
    "all_sparse": BASE.with_changes(first_k_dense_replace=0, n_group=2, topk_group=1),
    "theta": BASE.with_changes(rope_theta=50000.0),
    "v2_yarn": SOFTMAX.with_changes(rope_scaling=YARN),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(a: DeepseekV3, b: DeepseekV3) -> None:
    """The same names, types and bits."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def make(config: ModelConfig, seed: int = 0) -> Any:
    """transformers' model of this shape, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    table = config.to_hf()
    hf_config = AutoConfig.for_model(**table)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    randomise(model, seed)
    return model


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers makes of a folder; fails if it found keys missing or misshapen."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    config = model.config
    extra = tuple(
        f"model.layers.{config.num_hidden_layers + k}."
        for k in range(getattr(config, "num_mtp_layers", 0))
    )
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(extra or ("-",))]
    assert not unexpected, unexpected
    return model.eval()


def forget_layer_61(model: Any) -> None:
    """transformers knows MTP layers by the name of layer 61; our tiny models have fewer layers."""
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{model.config.num_hidden_layers + k}\..*"
        for k in range(model.config.num_mtp_layers)
    ]


def read_mtp(main: Any) -> Any:
    from transformers.modeling_layers import MtpModel

    forget_layer_61(main)
    return MtpModel.from_pretrained(main).eval()


def make_mtp(main: Any, seed: int) -> Any:
    from transformers.modeling_layers import MtpModel

    shared = {name: value.clone() for name, value in main.state_dict().items()}
    model = MtpModel(main, main.config.num_mtp_layers).eval()
    randomise(model, seed)
    main.load_state_dict(shared)  # embedding and head are shared: put them back
    return model


def mtp_state(main: Any, mtp: Any) -> dict[str, Tensor]:
    """The MTP modules' tensors under the checkpoint's names, repeated ones included."""
    state: dict[str, Tensor] = {}
    for depth, layer in enumerate(mtp.layers):
        prefix = f"model.layers.{main.config.num_hidden_layers + depth}."
        for name, value in layer.state_dict().items():
            name = name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm")
            if "experts.gate_up_proj" in name:
                for e, (gate, up) in enumerate(v.chunk(2) for v in value):
                    state[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate.clone()
                    state[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up.clone()
            elif "experts.down_proj" in name and "shared" not in name:
                for e, down in enumerate(value):
                    state[f"{prefix}mlp.experts.{e}.down_proj.weight"] = down.clone()
            else:
                state[prefix + name] = value.clone()
        state[prefix + "embed_tokens.weight"] = main.get_input_embeddings().weight.detach().clone()
        state[prefix + "shared_head.head.weight"] = main.lm_head.weight.detach().clone()
    return state


@torch.no_grad()
def mtp_logits(main: Any, mtp: Any, tokens_BT: Tensor) -> list[Tensor]:
    """Logits of each depth from transformers, for the positions that have all their tokens."""
    hidden = main.model(tokens_BT).last_hidden_state
    logits = []
    for depth in range(1, len(mtp.layers) + 1):
        next_tokens = tokens_BT[:, depth:]
        hidden = hidden[:, : next_tokens.shape[1]]
        positions = torch.arange(next_tokens.shape[1])[None]
        hidden = mtp.forward_layer(depth - 1, hidden, positions, None, input_ids=next_tokens)
        logits.append(main.lm_head(hidden).float())
    return logits


@torch.no_grad()
def our_mtp_logits(model: DeepseekV3, tokens_BT: Tensor) -> list[Tensor]:
    hidden = model.hidden(tokens_BT)
    logits = []
    for depth in range(1, model.config.num_nextn_predict_layers + 1):
        next_tokens = tokens_BT[:, depth:]
        hidden = hidden[:, : next_tokens.shape[1]]
        hidden = model.mtp_hidden(depth, hidden, next_tokens)
        logits.append(model.head(hidden))
    return logits
