"""A model's parts are given kernels from outside, for what they hold. Oracle: torch's own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.model.served import Served, use_kernels
from rorqual.model.stored import StoredStack
from rorqual.ops.kernels import DECODED, FP8, TORCH, WIDENED, Machine
from small import SMALL, lively, random_tokens

OLD = Machine("cpu", has_bfloat16=False)
BFLOAT16 = 2e-2  # relative: rounding in other places


def names(model: DeepseekV3) -> set[str]:
    return {module.kernels.name for module in model.modules() if isinstance(module, Served)}


def small() -> DeepseekV3:
    """Each token takes all experts: another rounding would make it choose others."""
    return lively(SMALL.with_changes(n_routed_experts=2)).bfloat16()


def test_every_part_of_a_model_has_torchs_until_somebody_chooses() -> None:
    model = small()
    assert names(model) == {"torch"}
    use_kernels(model, machine=OLD)
    assert names(model) == {"widened"}
    use_kernels(model, machine=Machine("cpu", has_bfloat16=True))
    assert names(model) == {"torch"}
    use_kernels(model.float(), machine=OLD)
    assert names(model) == {"torch"}


def test_widened_weights_give_values_and_gradients_in_every_mode() -> None:
    """A user of an old processor who loads bfloat16 and calls the model, or trains it."""
    model, ids = small(), random_tokens(SMALL, 2, 33)
    results = []
    for machine in (OLD, Machine("cpu", has_bfloat16=True)):
        use_kernels(model, machine=machine)
        model.zero_grad()
        logits = model(ids)
        with torch.no_grad():
            assert torch.equal(model(ids), logits)
        with torch.inference_mode():
            assert torch.equal(model(ids), logits)
        logits.logsumexp(-1).mean().backward()
        gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (found, ours), (expected, theirs) = results
    assert (found - expected).norm() < BFLOAT16 * expected.norm()
    assert ours.keys() == theirs.keys()
    total = torch.cat([gradient.flatten() for gradient in theirs.values()])
    found = torch.cat([gradient.flatten() for gradient in ours.values()])
    assert torch.nn.functional.cosine_similarity(found, total, dim=0) > 0.99


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_that_is_cast_or_moved_has_torchs_again(is_tied: bool) -> None:
    model = lively(SMALL.with_changes(tie_word_embeddings=is_tied)).bfloat16()
    for change in (lambda m: m.float(), lambda m: m.to("meta")):
        changed = copy.deepcopy(model)
        use_kernels(changed, machine=OLD)
        assert names(changed.to("cpu").bfloat16()) == {"widened"}, "nothing has changed"
        assert names(change(changed)) == {"torch"}
        assert names(changed.to_empty(device="cpu").bfloat16()) == {"torch"}, "nobody chose"


def test_copies_have_the_same_kernels() -> None:
    model = small()
    use_kernels(model, machine=OLD)
    parts = [part for part in copy.deepcopy(model).modules() if isinstance(part, Served)]
    assert {part.kernels for part in parts} == {WIDENED}


def test_kernels_that_can_serve_no_part_are_refused() -> None:
    model = lively(SMALL)
    with pytest.raises(UsageError, match="'widened' serve no part") as caught:
        use_kernels(model, "widened")
    assert "torch" in str(caught.value)
    assert names(model) == {"torch"}
    with pytest.raises(UsageError, match="unknown kernels"):
        use_kernels(model, "fast")
    use_kernels(model, "plain")
    assert names(model) == {"plain"}
    for name, fault in (("widened", "serve no part"), ("fast", "unknown kernels")):
        with pytest.raises(UsageError, match=fault):
            use_kernels(model, name)
        assert names(model) == {"plain"}, "what is refused changes nothing"


@pytest.mark.parametrize("has_native", [True, False])
def test_a_slow_choice_is_said_aloud(caplog: pytest.LogCaptureFixture, *, has_native: bool) -> None:
    model, old = small(), replace(OLD, has_native=has_native)
    with caplog.at_level("WARNING", logger="rorqual.model"):
        use_kernels(model, "widened")
        use_kernels(model.float(), machine=old)
        assert not caplog.text, "chosen so, or of no use"
        use_kernels(model.bfloat16(), machine=old)
    assert "load the model as native" in caplog.text
    assert ("install g++" in caplog.text) == (not has_native)


def test_the_class_says_what_serves_at_first() -> None:
    from rorqual.model.layers import Linear
    from rorqual.model.stored import StoredStack

    assert Linear.kernels is TORCH
    assert StoredStack.kernels is DECODED


@pytest.mark.slow  # half a minute of tracing
def test_a_compiled_model_breaks_its_graph_at_widened_weights_and_is_right() -> None:
    model, ids = small(), random_tokens(SMALL, 2, 33)
    use_kernels(model, machine=OLD)
    results = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        logits = run(ids)
        logits.logsumexp(-1).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((logits.detach(), *gradients))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_must_be_exact_keeps_its_dtype_when_a_model_is_cast(dtype: torch.dtype) -> None:
    """Angles, the router's bias and the balance loss. Oracle: the model before."""
    model = lively(SMALL)
    before = dict(model.named_buffers())
    kept = {name: buffer.clone() for name, buffer in before.items()}
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert kept
    assert all(
        buffer.dtype == kept[name].dtype and torch.equal(buffer, kept[name])
        for name, buffer in model.named_buffers()
    )
    assert {buffer.device.type for buffer in model.to("meta").buffers()} == {"meta"}


def test_the_scales_of_stored_blocks_are_as_exact_when_the_model_is_cast() -> None:
    stack = StoredStack(FP8, (1, 4, 8), 8, (2, 4))
    scales = torch.tensor([[[1 / 3, 1 / 5], [1 / 7, 1 / 9]]])
    assert stack.scales_EXY is not None
    stack.scales_EXY.copy_(scales)
    assert torch.equal(stack.bfloat16().scales_EXY, scales)
