"""Norms and up-projections computed again (report §3.2.3).

Oracles: the same model that keeps everything, bit for bit; the shapes of what the report says is
not kept, looked for among all that is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from small_run import RECIPE, STAGES
from torch import Tensor, nn

from rorqual.errors import ConfigError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.mla import MLA
from rorqual.plan.live import Live
from rorqual.train import load_recipe
from rorqual.train.loss import TrainingModel, balance_seen, coefficients, target_counts
from rorqual.train.precision import compute_in
from rorqual.train.recipe import toml_text
from rorqual.train.recompute import recompute
from rorqual.train.recompute_norms import Recorder, Saved
from small import SMALL, lively, random_tokens

TWO = SMALL.with_changes(num_nextn_predict_layers=2)
DIRECT = SMALL.with_changes(q_lora_rank=None)
DENSE = SMALL.with_changes(first_k_dense_replace=SMALL.num_hidden_layers)
CONFIGS = {"small": SMALL, "two depths": TWO, "no q_lora": DIRECT, "dense": DENSE}
LENGTH = 12


def gradients(model: DeepseekV3, *, documents: bool = False, passes: int = 1) -> dict[str, Tensor]:
    """Of the training loss, accumulated over as many micro-batches, with what the layers saw."""
    depths = model.config.num_nextn_predict_layers
    model.train()
    root = TrainingModel(model, is_fused=False)
    for seed in range(passes):
        tokens_BS = random_tokens(model.config, 2, LENGTH + 1 + depths, seed=seed)
        mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        documents_BS = (torch.arange(LENGTH + 1 + depths) // 5 + 1).expand(2, -1)
        given = documents_BS if documents else None
        counts_C = target_counts(mask_BS, depths, given)
        by = coefficients(counts_C, 2 * passes, 0.3, 1e-2)
        parts = root(tokens_BS=tokens_BS, mask_BS=mask_BS, documents_BS=given, by=by)
        parts.total.backward()
    seen = balance_seen(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loads": seen.loads_LE, "balance": seen.loss, "total": parts.total.detach()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_gradients_are_those_of_a_model_that_keeps_everything(
    shape: str, precision: str, documents: bool
) -> None:
    models = [lively(CONFIGS[shape]) for _ in range(2)]
    recompute(models[1], "norms")
    for model in models:
        compute_in(model, precision)
    same(*(gradients(model, documents=documents, passes=2) for model in models))


def test_frozen_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a segment keeps depends on what learns."""
    for frozen in ("embed_tokens", "kv_a_proj", "q_b_proj", "input_layernorm", "layers.0.", "norm"):
        models = [lively(SMALL) for _ in range(2)]
        recompute(models[1], "norms")
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in name)
        same(*(gradients(model) for model in models))


def copied(model: DeepseekV3) -> DeepseekV3:
    return copy.deepcopy(model)


def twice(model: DeepseekV3) -> DeepseekV3:
    recompute(model, "norms")
    return model


def stored(model: DeepseekV3) -> DeepseekV3:
    again = lively(model.config.with_changes(initializer_range=0.5))
    again.load_state_dict(model.state_dict())
    return twice(again)


@pytest.mark.parametrize("change", [copied, twice, stored])
def test_it_survives(change: Callable[[DeepseekV3], DeepseekV3]) -> None:
    plain, model = lively(SMALL), lively(SMALL)
    recompute(model, "norms")
    same(gradients(plain), gradients(change(model)))


def test_a_graph_that_is_used_again_makes_everything_again() -> None:
    model = lively(SMALL).train()
    recompute(model, "norms")
    loss = model(random_tokens(SMALL, 2, LENGTH)).logsumexp(-1).mean()
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    same(first, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_nothing_stays_behind_a_pass() -> None:
    """Of all tensors that a pass there and back made, the gradients alone are alive, without any
    help of the garbage collector, which does not see into autograd.
    """
    model = lively(SMALL).train()
    recompute(model, "norms")
    step = model.model.step(random_tokens(SMALL, 2, LENGTH))
    for layer in list(model.model.layers.values())[:2]:
        x = torch.zeros(2, LENGTH, SMALL.hidden_size, requires_grad=True)
        with Live() as live:
            y = layer(x, step)
            kept = live.now
            y.sum().backward()
            assert live.most > kept
            del y
            left = live.now
        gradients = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
        assert left == sum(gradient.nbytes for gradient in gradients)


def test_nothing_is_recorded_without_gradients_or_outside_of_training() -> None:
    plain, model = lively(SMALL), lively(SMALL)
    recompute(model, "norms")
    ids = random_tokens(SMALL, 2, LENGTH)
    with torch.no_grad():
        assert torch.equal(plain(ids), model.train()(ids))
    with kept() as found:
        assert torch.equal(plain.eval()(ids), model.eval()(ids))
    assert not found.replaced


class Kept:
    """What autograd keeps inside of layers: (shape, storage) of tensors, and how many were
    replaced."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.replaced = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@contextmanager
def kept() -> Iterator[Kept]:
    found, pack = Kept(), Recorder.pack

    def spy(self: Recorder, tensor: Tensor) -> Tensor | Saved:
        saved = pack(self, tensor)
        if isinstance(saved, Tensor):
            found.tensors[saved.untyped_storage()._cdata] = saved
        else:
            found.replaced += 1
        return saved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "pack", spy)
        yield found


def outputs(model: DeepseekV3, is_wanted: Callable[[str, nn.Module], bool]) -> list[Tensor]:
    """A list that fills with what these modules make."""
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if is_wanted(name, module):
            module.register_forward_hook(
                lambda _, __, out: found.extend(out if isinstance(out, tuple) else (out,))
            )
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_outputs_of_norms_and_up_projections_are_not_kept(precision: str) -> None:
    """By the memory that they lie in, and by what attention was given."""
    model = lively(SMALL).train()
    recompute(model, "norms")
    compute_in(model, precision)
    made = outputs(
        model,
        lambda name, _: (
            "layers." in name
            and name.endswith(("layernorm", "q_b_proj", "kv_b_proj", "enorm", "hnorm"))
        ),
    )
    given: list[Tensor] = []
    for layer in model.model.layers.values():
        attend(layer.self_attn, given)
    with kept() as found:
        gradients(model)
    assert found.replaced > 20
    places = {tensor.untyped_storage()._cdata for tensor in (*made, *given)}
    assert len(given) == 3 * len(model.model.layers)
    assert not places & found.tensors.keys()


def attend(attention: MLA, given: list[Tensor]) -> None:
    """Notes queries, keys and values."""
    from dataclasses import replace

    chosen = attention.kernels

    def noted(*parts: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            given.extend(parts[:3])
        return chosen.attention(*parts)

    attention.kernels = replace(chosen, attention=noted)


def test_what_is_kept_shrinks_by_what_the_report_names() -> None:
    """A layer keeps at least two normed streams, keys and values less, and whole attention is not
    computed again: its products run as often as in the plain model.
    """
    config: ModelConfig = SMALL
    sizes, calls = [], []
    for how in ("plain", "norms"):
        model = lively(config).train()
        counted: list[int] = []
        for layer in model.model.layers.values():
            count(layer.self_attn, counted)
        if how == "norms":
            recompute(model, "norms")
            with kept() as found:
                gradients(model)
            sizes.append(found.num_bytes)
        else:
            sizes.append(kept_by(model))
        calls.append(len(counted))
    tokens, layers = 2 * LENGTH, config.num_layers_with_mtp
    heads = config.num_attention_heads
    a_token = 2 * config.hidden_size + heads * (
        config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    )
    assert sizes[0] - sizes[1] >= 4 * tokens * layers * a_token
    assert calls[0] == calls[1]


def count(attention: MLA, calls: list[int]) -> None:
    from dataclasses import replace

    chosen = attention.kernels

    def counted(*parts: Tensor) -> Tensor:
        calls.append(1)
        return chosen.attention(*parts)

    attention.kernels = replace(chosen, attention=counted)


def kept_by(model: DeepseekV3) -> int:
    """Bytes that autograd keeps in all layers of a plain model."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    for layer in model.model.layers.values():
        forward = layer.forward

        def hooked(*inputs: object, forward: Callable[..., object] = forward) -> object:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return forward(*inputs)

        layer.forward = hooked
    gradients(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_true_and_false_are_the_choices_of_old_recipes(tmp_path: object) -> None:
    file = tmp_path / "recipe.toml"  # type: ignore[operator]
    file.write_text(toml_text(RECIPE))
    choices = {"true": "layers", "false": "none", "norms": "norms", "layers": "layers"}
    for value, expected in choices.items():
        recipe = load_recipe(file, STAGES, [f"training.activation_checkpointing={value}"])
        assert recipe.training.activation_checkpointing == expected
    assert load_recipe(file, STAGES).training.activation_checkpointing == "none"
    with pytest.raises(ConfigError, match="norms' with compile"):
        load_recipe(
            file, STAGES, ["training.activation_checkpointing=norms", "training.compile=true"]
        )
