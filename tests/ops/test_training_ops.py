"""Operators of a training step. Oracle: their plain twins in float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.model.router import Router
from rorqual.ops import native
from rorqual.ops.training import attention, feed_forward, norm, route
from small import SMALL, variants

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
FLOAT32, BFLOAT16 = 2e-5, 2e-2  # of the largest value: other orders of sums; eight bits
Function = Callable[..., Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(function: Function, given: Sequence[Tensor | None]) -> list[Tensor]:
    """What it gives for these, and the gradients of a weighted sum of all."""
    given = [None if x is None else x.detach().clone() for x in given]
    leaves = [x.requires_grad_() for x in given if x is not None and x.is_floating_point()]
    made = function(*given)
    made = [made] if isinstance(made, Tensor) else list(made)
    made = [x for x in made if x.is_floating_point()]
    total = sum((x.double() * random(*x.shape, seed=9)).sum() for x in made)
    assert isinstance(total, Tensor)
    total.backward()
    assert all(leaf.grad is not None for leaf in leaves), "an input is given no gradient"
    return [x.detach() for x in (*made, *(leaf.grad for leaf in leaves)) if x is not None]


def agree(
    ours: Function, plain: Function, given: Sequence[Tensor | None], narrow: Sequence[int] = ()
) -> None:
    """In float32, and with the inputs `narrow` in bfloat16."""
    expected = outputs(plain, given)
    for is_narrow in (False, True) if narrow else (False,):
        taken = [
            x
            if x is None or not x.is_floating_point()
            else x.to(torch.bfloat16 if is_narrow and i in narrow else torch.float32)
            for i, x in enumerate(given)
        ]
        tolerance = BFLOAT16 if is_narrow else FLOAT32
        for found, wanted in zip(outputs(ours, taken), expected, strict=True):
            size = float(wanted.abs().max())
            torch.testing.assert_close(
                found.double(), wanted.double(), rtol=0, atol=tolerance * max(size, 1e-3)
            )


@pytest.mark.parametrize(("num_rows", "width"), [(3, 64), (130, 96), (65, 7), (1, 1), (64, 40)])
def test_norm(num_rows: int, width: int) -> None:
    x, weight = random(num_rows, width), 1 + random(width, seed=1)
    both = x.float(), weight.float()
    agree(
        lambda x, w: norm.norm(x, w, 1e-6, x.dtype),
        lambda x, w: norm.norm_plain(x, w, 1e-6, torch.float64),
        both,
        [0],
    )


def test_norm_of_rows_that_lie_apart() -> None:
    apart = random(20, 96).float()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return norm.norm(x[:, :64], w, 1e-6, torch.float32)

    agree(
        ours,
        lambda x, w: norm.norm_plain(x[:, :64], w, 1e-6, torch.float64),
        (apart, random(64, seed=1)),
    )


def test_norm_of_what_lies_across() -> None:
    """A copy of the rows is held until they are read."""
    across = random(96, 3, 40).float().transpose(0, 2)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return norm.norm(x * 1, w, 1e-6, torch.float32)

    agree(
        ours,
        lambda x, w: norm.norm_plain(x, w, 1e-6, torch.float64),
        (across, random(96, seed=1)),
    )


@pytest.mark.parametrize("more_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norm(more_dtype: torch.dtype, dtype: torch.dtype) -> None:
    given = random(70, 48), random(70, 48, seed=1), 1 + random(48, seed=2)
    expected = outputs(lambda *a: norm.add_norm_plain(*a, 1e-6, torch.float64), given)
    x, more, weight = (tensor.float() for tensor in given)
    found = outputs(lambda *a: norm.add_norm(*a, 1e-6, dtype), (x, more.to(more_dtype), weight))
    is_narrow = torch.bfloat16 in (more_dtype, dtype)
    for one, other in zip(found, expected, strict=True):
        tolerance = (BFLOAT16 if is_narrow else FLOAT32) * float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


def test_a_norm_whose_output_teaches_nothing_gives_the_residuals_gradient() -> None:
    x, more = random(5, 16).float().requires_grad_(), random(5, 16, seed=1).float()
    total, _, _ = norm.add_norm(x, more, torch.ones(16), 1e-6, torch.float32)
    total.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones(5, 16))


@pytest.mark.parametrize(("num_rows", "inner"), [(33, 32), (5, 7), (1, 20)])
def test_feed_forward(num_rows: int, inner: int) -> None:
    given = (
        random(num_rows, 24), random(inner, 24, seed=1), random(inner, 24, seed=2),
        random(24, inner, seed=3),
    )  # fmt: skip
    agree(feed_forward.feed_forward, feed_forward.feed_forward_plain, given, [0])


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("inner", [16, 7])
def test_routed_experts_of_which_some_get_no_row(inner: int, has_base: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 6, generator=generator)
    scores[:, [0, 3]] = -1  # chosen by none
    experts = scores.topk(2).indices
    given = (
        random(50, 24), random(50, 24, seed=1) if has_base else None, random(50, 2, seed=2).abs(),
        experts, random(6, 2 * inner, 24, seed=3), random(6, 24, inner, seed=4),
    )  # fmt: skip
    agree(feed_forward.routed, feed_forward.routed_plain, given, [0, 1])


@pytest.mark.parametrize(
    "name", ["base", "groups", "half_of_groups", "not_normalised", "v2_greedy", "v2_groups"]
)
def test_route_is_the_routers_choice(name: str) -> None:
    config = variants(SMALL)[name]
    router = Router(config)
    if config.has_correction_bias:
        router.e_score_correction_bias.copy_(0.1 * random(config.n_routed_experts, seed=5))
    logits = random(200, config.n_routed_experts)

    class Ours:
        route = staticmethod(route.route)

    ours = router._trained(logits.float(), Ours)  # type: ignore[arg-type]
    assert torch.equal(ours.experts_TK, router.choice(logits.float()).experts_TK)
    agree(
        lambda x: router._trained(x, Ours)[::2],  # type: ignore[arg-type]
        lambda x: router.choice(x)[::2],
        [logits],
    )


def test_scores_that_underflow_stay_finite() -> None:
    logits = torch.full((2, 8), -1e4).requires_grad_()
    weights, experts, _ = route.route(logits, torch.zeros(8), 2, [4, 2, 2], False, True, 2.5)
    weights.sum().backward()
    assert experts.tolist() == [[0, 1], [0, 1]]
    assert bool(weights.isfinite().all())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


WIDTHS = [
    attention.Widths(2, 5, 3, 16, 8, 12),
    attention.Widths(1, 1, 1, 8, 2, 8),
    attention.Widths(2, 130, 2, 24, 8, 20),
    attention.Widths(1, 64, 1, 7, 4, 5),
]


def attention_inputs(widths: attention.Widths, by_sequence: bool = False) -> list[Tensor]:
    num_rows = widths.num_sequences * widths.num_tokens
    angles = random(
        widths.num_sequences if by_sequence else 1, widths.num_tokens, widths.turned // 2, seed=7
    )
    return [
        random(num_rows, widths.num_heads * (widths.nope + widths.turned)),
        random(num_rows, widths.num_heads * (widths.nope + widths.value), seed=1),
        random(num_rows, widths.turned, seed=2),
        angles.cos().float(),
        angles.sin().float(),
    ]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_attention(widths: attention.Widths, is_packed: bool) -> None:
    *given, cos, sin = attention_inputs(widths, by_sequence=is_packed)
    documents = None
    if is_packed:
        shape = widths.num_sequences, widths.num_tokens
        starts = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.05
        documents = starts.long().cumsum(1) + 1
        documents[torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.1] = 0

    def attend(function: Function) -> Function:
        return lambda *x: function(*x, cos, sin, documents, widths, 0.2)

    agree(
        attend(attention.latent_attention),
        attend(attention.latent_attention_plain),
        given,
        [0, 1, 2],
    )


def test_attention_keeps_no_scores() -> None:
    """What autograd saves is linear in the tokens."""
    saved = []
    for num_tokens in (64, 256):
        widths = attention.Widths(1, num_tokens, 2, 16, 8, 16)
        q, kv, rope, cos, sin = (x.float() for x in attention_inputs(widths))
        sizes: list[int] = []

        def note(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            attention.latent_attention(q.requires_grad_(), kv, rope, cos, sin, None, widths, 0.2)
        saved.append(sum(sizes))
    assert saved[1] == 4 * saved[0]


def test_opcheck() -> None:
    """Fake kernels, schemas and registration of each operator are as torch.compile wants them."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = random(9, 16).float().requires_grad_()
    torch.library.opcheck(
        norm._norm, (x, None, torch.ones(16), 1e-6, torch.bfloat16, False), test_utils=tests
    )
    torch.library.opcheck(
        norm._norm, (x, x.detach(), torch.ones(16), 1e-6, torch.float32, True), test_utils=tests
    )
    weights = [random(*shape, seed=3).float() for shape in ((8, 16), (8, 16), (16, 8))]
    torch.library.opcheck(feed_forward._forward, (x, *weights), test_utils=tests)
    experts = torch.arange(18).view(9, 2) % 3
    stacks = random(3, 8, 16).float(), random(3, 16, 4).float()
    routed = x, None, torch.rand(9, 2), experts, *stacks
    torch.library.opcheck(feed_forward._routed, routed, test_utils=tests)
    logits = random(9, 8).float().requires_grad_()
    torch.library.opcheck(
        route._route, (logits, torch.zeros(8), 2, [], False, True, 1.0), test_utils=tests
    )
    widths = attention.Widths(1, 9, 1, 8, 4, 8)
    q, kv, rope, cos, sin = (x.float() for x in attention_inputs(widths))
    given = (q.requires_grad_(), kv, rope, cos, sin, None, list(widths), 0.2)
    torch.library.opcheck(attention._attend, given, test_utils=tests)
