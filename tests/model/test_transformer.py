"""The whole model against transformers, and each of its twin computations against the other.

Oracles: transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM with the same random weights.
"""

from __future__ import annotations

import pytest
import torch
from shapes import CONFIGS
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from rorqual.model import DeepseekV3, ModelConfig, Part, build, empty, preset
from rorqual.model.block import Block
from rorqual.model.layers import RMSNorm
from rorqual.model.served import use_kernels
from rorqual.train.precision import compute_in
from rorqual.train.recompute import recompute_layers
from small import SMALL, YARN, lively, random_tokens, relative_error

FLOAT32_RELATIVE = 1e-5  # the bar for float32 logits
BF16_RELATIVE = 1e-2


def transformers_twin(model: DeepseekV3) -> torch.nn.Module:
    """The same weights in transformers' class (its experts are stacked like ours)."""
    is_v3 = model.config.scoring_func == "sigmoid"
    config_class = DeepseekV3Config if is_v3 else DeepseekV2Config
    model_class = DeepseekV3ForCausalLM if is_v3 else DeepseekV2ForCausalLM
    theirs = model_class(config_class(**model.config.to_hf())).eval()
    main = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(
            tuple(
                f"model.layers.{i}."
                for i in range(model.config.num_hidden_layers, model.config.num_layers_with_mtp)
            )
        )
    }
    theirs.load_state_dict(main, strict=True)
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(name: str) -> None:
    model = lively(CONFIGS[name])
    ids = random_tokens(model.config, 2, 70)  # past YaRN's original length of 32 and 16
    assert relative_error(model(ids), transformers_twin(model)(ids).logits) < FLOAT32_RELATIVE


@pytest.mark.parametrize("name", ["another_epsilon", "v2_groups"])
def test_epsilons_are_those_of_transformers(name: str) -> None:
    """Norms of latents keep 1e-6 whatever `rms_norm_eps` says; logits hardly show which it was."""
    model = lively(CONFIGS[name])
    ours = {
        module_name: module.eps
        for module_name, module in model.named_modules()
        if isinstance(module, RMSNorm)
    }
    theirs = {
        module_name: module.variance_epsilon
        for module_name, module in transformers_twin(model).named_modules()
        if hasattr(module, "variance_epsilon")
    }
    assert len(theirs) > 6
    assert {module_name: ours[module_name] for module_name in theirs} == theirs
    mtp = {module_name: ours[module_name] for module_name in ours if module_name not in theirs}
    for module_name, eps in mtp.items():
        assert eps == (1e-6 if "_a_layernorm" in module_name else model.config.rms_norm_eps)


@torch.no_grad()
def test_mtp_depths_chain_as_the_report_says() -> None:
    """Depth 2 takes depth 1's normed hidden state and the embeddings one further (§2.2)."""
    model = lively(CONFIGS["two_mtp"])
    ids = random_tokens(model.config, 2, 12)
    h = model.hidden(ids[:, :10])
    first = model.mtp_hidden(1, h, ids[:, 1:11])
    second = model.mtp_hidden(2, first, ids[:, 2:12])
    module = model.model.layers[str(model.config.num_hidden_layers + 1)]
    joined = torch.cat(
        [module.enorm(model.model.embed_tokens(ids[:, 2:12])), module.hnorm(first)], dim=-1
    )
    step = model.model.step(ids[:, 2:12])
    expected = module.shared_head.norm(Block.forward(module, module.eh_proj(joined), step))
    torch.testing.assert_close(second, expected)


class WholeCache:
    """The plainest cache: concatenation. Every step is one part."""

    def __init__(self, use_absorbed: bool) -> None:
        self.use_absorbed = use_absorbed
        self.latents: dict[int, torch.Tensor] = {}

    def append(self, layer_id: int, latent_BTL: torch.Tensor) -> list[Part]:
        old = self.latents.get(layer_id)
        new = latent_BTL if old is None else torch.cat([old, latent_BTL], dim=1)
        self.latents[layer_id] = new
        return [Part(latent_BTL.shape[0] * latent_BTL.shape[1], new, None, self.use_absorbed)]


@pytest.mark.parametrize("name", ["base", "no_q_lora", "groups", "yarn", "v2_greedy"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_cached_equals_uncached_in_both_forms(name: str, chunk: int, absorbed: bool) -> None:
    model = lively(CONFIGS[name])
    ids = random_tokens(model.config, 2, 40)
    cache = WholeCache(absorbed)
    parts = []
    for start in range(0, 40, chunk):
        positions = torch.arange(start, min(start + chunk, 40))[None]
        step = ids[:, start : start + chunk]
        parts.append(model.hidden(step, model.model.cached_step(positions, cache)))
    cached = model.head(torch.cat(parts, dim=1))
    assert relative_error(cached, model(ids)) < FLOAT32_RELATIVE


class TwoParts:
    """A flat step of two sequences without a past: the first two tokens and the last three."""

    def append(self, layer_id: int, latent_BTL: torch.Tensor) -> list[Part]:
        visible = torch.tensor([[True, False], [True, True]])[None, None]
        first = Part(2, latent_BTL[:, :2], visible, use_absorbed=True)
        return [first, Part(3, latent_BTL[:, 2:], None, use_absorbed=False)]


@torch.no_grad()
def test_the_parts_of_a_flat_step_equal_each_alone() -> None:
    model = lively(CONFIGS["yarn"])
    ids = random_tokens(model.config, 1, 5)
    step = model.model.cached_step(torch.tensor([[0, 1, 0, 1, 2]]), TwoParts())
    flat = model.hidden(ids, step)
    for part, alone in ((flat[:, :2], ids[:, :2]), (flat[:, 2:], ids[:, 2:])):
        assert relative_error(part, model.hidden(alone)) < FLOAT32_RELATIVE


@torch.no_grad()
def test_torchs_kernels_equal_the_plain_ones() -> None:
    model = lively(SMALL)
    ids = random_tokens(SMALL, 2, 33)
    grouped = model(ids)
    use_kernels(model, "plain")
    torch.testing.assert_close(grouped, model(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # C++ compilation; one graph and equal losses: train/test_step.py
def test_compiled_equals_eager_forward_and_backward() -> None:
    config = SMALL.with_changes(num_hidden_layers=2)
    model = lively(config).train()
    ids = random_tokens(config, 2, 16)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).logsumexp(-1).mean()

    eager = loss(ids)
    eager.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(loss)(ids)
    compiled.backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_nothing() -> None:
    model = lively(SMALL).train()
    ids = random_tokens(SMALL, 2, 20)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        h = model.hidden(ids[:, :-1])
        mtp = model.mtp_hidden(1, h, ids[:, 1:])
        (model.head(h).logsumexp(-1).mean() + model.head(mtp).logsumexp(-1).mean()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    recompute_layers(model)
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@torch.no_grad()
def test_bf16_stays_near_float32() -> None:
    model = lively(SMALL.with_changes(num_nextn_predict_layers=0))
    ids = random_tokens(SMALL, 2, 24)
    full = model(ids)
    half = model.to(torch.bfloat16)
    for router in half.routers():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    error = (half(ids) - full).norm(dim=-1) / full.norm(dim=-1)
    # The median token: where two experts tie within bf16's step, a token may route differently.
    assert float(error.median()) < 2 * BF16_RELATIVE


@torch.no_grad()
def test_isolated_documents_equal_each_alone() -> None:
    """Packing with isolation is only packing (§5.1)."""
    model = lively(CONFIGS["yarn"])
    first, second = random_tokens(SMALL, 2, 9), random_tokens(SMALL, 2, 14, seed=1)
    packed = torch.cat([first, second], dim=1)
    documents = torch.tensor([[3] * 9 + [4] * 14] * 2)
    h = model.hidden(packed, model.model.step(packed, documents))
    for part, ids in ((h[:, :9], first), (h[:, 9:], second)):
        assert relative_error(part, model.hidden(ids)) < FLOAT32_RELATIVE
    step = model.model.step(second[:, 1:], documents[:, 10:])
    mtp = model.mtp_hidden(1, h[:, 9:-1], second[:, 1:], step)
    alone = model.mtp_hidden(1, h[:, 9:-1], second[:, 1:])
    assert relative_error(mtp, alone) < FLOAT32_RELATIVE


def test_products_in_bfloat16_leave_the_stream_in_float32() -> None:
    """Oracle: the report's list of what stays; float32."""
    model = lively(SMALL)
    ids = random_tokens(SMALL, 1, 8)
    exact = model(ids)
    compute_in(model, "bfloat16")
    dtypes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, out, name=name: dtypes.update({name: getattr(out, "dtype", None)})
        )
    error = ((model(ids) - exact).norm(dim=-1) / exact.norm(dim=-1)).detach()
    assert float(error.median()) < 2 * BF16_RELATIVE
    assert dtypes["model.embed_tokens"] == dtypes["model.norm"] == torch.float32
    assert dtypes["model.layers.1"] == dtypes["model.layers.1.post_attention_layernorm"]
    assert dtypes["model.layers.1"] == torch.float32
    for name in ("mlp", "mlp.experts", "mlp.shared_experts", "self_attn", "self_attn.o_proj"):
        assert dtypes[f"model.layers.1.{name}"] == torch.bfloat16, name
    compute_in(model, "float32")
    assert torch.equal(model(ids), exact)


def test_build_is_seeded_and_follows_the_initialisation_of_the_report() -> None:
    config = SMALL.with_changes(initializer_range=0.006)
    first, second, other = build(config, seed=3), build(config, seed=3), build(config, seed=4)
    weight = first.model.layers["1"].mlp.experts.gate_up_proj
    assert torch.equal(weight, second.model.layers["1"].mlp.experts.gate_up_proj)
    assert not torch.equal(weight, other.model.layers["1"].mlp.experts.gate_up_proj)
    assert abs(float(weight.detach().std()) - 0.006) < 0.0003
    assert float(weight.detach().mean().abs()) < 0.0003


@pytest.mark.parametrize(
    ("name", "main", "mtp"),
    [("671b", 671_026_419_200, 11_610_068_224), ("16b", 15_706_484_224, 0)],
)
def test_presets_have_the_published_parameters(name: str, main: int, mtp: int) -> None:
    """671B: the report; 16b: DeepSeek-V2-Lite's card says 15.7B."""
    config = preset(name)
    model = empty(config, device="meta")
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    counts = {True: 0, False: 0}
    for tensor_name, value in model.state_dict().items():
        counts[tensor_name.startswith(first_mtp)] += value.numel()
    assert counts[False] == main
    assert counts[True] == mtp


def test_tied_embeddings_are_one_tensor() -> None:
    for model in (build(CONFIGS["tied"]), empty(CONFIGS["tied"], torch.bfloat16)):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bias_stays_float32_in_a_bf16_model() -> None:
    model = empty(SMALL, torch.bfloat16)
    assert {r.e_score_correction_bias.dtype for r in model.routers()} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_yarn_shape_of_frequencies() -> None:
    """Fast pairs are left alone, slow ones are stretched by the factor (arXiv 2309.00071 §3.2)."""
    config: ModelConfig = preset("671b")
    yarn = empty(config.with_changes(**TINY_BUT_ROPE)).model.rotary.inv_freq
    plain = empty(config.with_changes(**TINY_BUT_ROPE, rope_scaling=None)).model.rotary.inv_freq
    assert torch.equal(yarn[:5], plain[:5])
    torch.testing.assert_close(yarn[-5:] * 40, plain[-5:])
    assert YARN.rope_magnitude == 1.0


TINY_BUT_ROPE = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "num_nextn_predict_layers": 0,
    "kv_lora_rank": 8,
}
