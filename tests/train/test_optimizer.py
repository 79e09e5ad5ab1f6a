"""AdamW. Oracle: torch.optim.AdamW; bfloat16 moments against float32 ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rorqual.config import fill
from rorqual.errors import ConfigError
from rorqual.model import DeepseekV3
from rorqual.train.optimizer import AdamW, OptimizerSettings

MakeModel = Callable[..., DeepseekV3]
NUM_STEPS = 5


def gradients(model: DeepseekV3, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_equals_torch(make_model: MakeModel, moments: str) -> None:
    ours, theirs = make_model(), make_model()
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    options = fill(OptimizerSettings, {"moments": moments})
    optimizer = AdamW(ours, options)
    for step in range(NUM_STEPS):
        lr = 1e-3 * (step + 1)
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.set_lr(lr)
        optimizer.step()
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    # bfloat16 moments carry 8 bits: a part in 256 of updates that add up to about 0.015.
    tolerance = 1e-6 if moments == "float32" else 0.015 / 256 * 2
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=tolerance)
        assert parameter.dtype == torch.float32
        assert optimizer.state[parameter]["exp_avg"].dtype == getattr(torch, moments)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_state_dict_goes_on_bit_for_bit(make_model: MakeModel, moments: str) -> None:
    """As torch's own optimisers, DCP and FSDP keep them: one goes on from another's state."""
    options = fill(OptimizerSettings, {"moments": moments})
    models = make_model(), make_model()
    whole, second = (AdamW(model, options) for model in models)
    for step in range(2):
        gradients(models[0], step)
        whole.set_lr(1e-3)
        whole.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(whole.state_dict())
    assert second.param_groups[0]["lr"] == 1e-3
    for optimizer, model in zip((whole, second), models, strict=True):
        gradients(model, 2)
        optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(t, second.state_tensors()[n]) for n, t in whole.state_tensors().items())
    assert second.num_steps == 3


def test_clip_returns_the_norm_and_scales_to_one(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = AdamW(model, OptimizerSettings())
    gradients(model, 0)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(optimizer.clip(), expected)
    torch.testing.assert_close(optimizer.clip(), torch.tensor(1.0))
    without = AdamW(model, fill(OptimizerSettings, {"clip_norm": None}))
    gradients(model, 0)
    without.clip()
    torch.testing.assert_close(without.clip(), expected)


def test_tied_embedding_is_one_parameter(make_model: MakeModel) -> None:
    names = AdamW(make_model(), OptimizerSettings()).state_tensors()
    assert "exp_avg.model.embed_tokens.weight" in names
    assert "exp_avg.lm_head.weight" not in names


def test_betas_the_wrong_way_round_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"beta1 0\.99 exceeds beta2"):
        fill(OptimizerSettings, {"beta1": 0.99})


def test_step_counters_lie_beside_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own fused AdamW keeps them: a GPU's kernel cannot read a counter on the host."""
    from rorqual.train import optimizer as ours

    counters: list[torch.Tensor] = []

    def record(*tensors: list[torch.Tensor], **settings: object) -> None:
        counters.extend(tensors[5])

    monkeypatch.setattr(ours, "adamw", record)
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = AdamW(model, OptimizerSettings())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [counter.device.type for counter in counters] == ["meta", "meta"]
    assert [counter.shape for counter in counters] == [(), ()]


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_clip_leaves_gradients_within_the_limit_as_they_are(
    make_model: MakeModel, share: float
) -> None:
    """Bit for bit: clipping scales down, never up. `share` is of the limit."""
    model = make_model()
    gradients(model, 0)
    norm = torch.cat([_grad(p).flatten() for p in model.parameters()]).norm()
    for parameter in model.parameters():
        _grad(parameter).mul_(share / norm)
    before = [_grad(p).clone() for p in model.parameters()]
    # A little above, since the norm of what was scaled is rounded.
    optimizer = AdamW(model, fill(OptimizerSettings, {"clip_norm": 1.0 + 1e-5}))
    assert float(optimizer.clip()) == pytest.approx(share, rel=1e-5)
    for gradient, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(gradient, _grad(parameter))


def test_clip_keeps_the_direction(make_model: MakeModel) -> None:
    model = make_model()
    gradients(model, 0)
    before = torch.cat([_grad(p).flatten().clone() for p in model.parameters()])
    AdamW(model, fill(OptimizerSettings, {"clip_norm": 0.25})).clip()
    after = torch.cat([_grad(p).flatten() for p in model.parameters()])
    torch.testing.assert_close(after, before * (0.25 / before.norm()))


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
