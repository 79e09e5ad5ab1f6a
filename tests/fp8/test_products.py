"""Products in FP8. Oracle: float64 on the quantised operands, an expert and a matrix at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rorqual.fp8 import operands
from rorqual.fp8.operands import Fp8Options
from rorqual.fp8.products import experts, feed_forward, linear
from rorqual.ops import e5m6
from rorqual.ops.tile_fp8 import quantise_columns, quantise_rows, quantise_weight

OPTIONS = [Fp8Options(), Fp8Options(use_ue8m0=True), Fp8Options(gradients="block")]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp2(2 * torch.randn(*shape[:-1], 1, generator=generator))


def rows64(x: Tensor, options: Fp8Options) -> Tensor:
    return quantise_rows(x.float(), use_ue8m0=options.use_ue8m0).dequantise().double()


def columns64(x: Tensor, options: Fp8Options) -> Tensor:
    return quantise_columns(x.float(), use_ue8m0=options.use_ue8m0).dequantise().double()


def weight64(x: Tensor, options: Fp8Options) -> Tensor:
    return quantise_weight(x.float(), use_ue8m0=options.use_ue8m0).dequantise().double()


def gradient64(x: Tensor, options: Fp8Options) -> Tensor:
    return (weight64 if options.gradients == "block" else rows64)(x, options)


def close(found: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) < limit


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 7, 3), (131, 257, 130), (128, 128, 128), (1, 1, 1)])
@pytest.mark.parametrize("is_12", [False, True])
def test_the_three_products_of_a_linear(
    options: Fp8Options, shape: tuple[int, int, int], is_12: bool
) -> None:
    n, i, o = shape
    x, weight, grad = random(n, i), random(o, i, seed=1) / math.sqrt(i), random(n, o, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    y = linear(x, weight, options, keeps_e5m6=is_12)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    close(y.detach(), rows64(x.detach(), options) @ weight64(weight.detach(), options).T)
    close(x.grad, gradient64(grad, options) @ weight64(weight.detach(), options))
    kept = e5m6.quantise(x.detach()).dequantise() if is_12 else rows64(x.detach(), options)
    close(weight.grad, columns64(grad, options).T @ columns64(kept, options))


def test_leading_dimensions_and_dtypes_are_the_inputs() -> None:
    x = random(2, 3, 5, 40).bfloat16().requires_grad_()
    weight = random(9, 40, seed=1).requires_grad_()
    y = linear(x, weight, Fp8Options())
    assert y.shape == (2, 3, 5, 9)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


def expected_experts(
    rows: Tensor,
    stacks: tuple[Tensor, Tensor, Tensor],
    weights: Tensor,
    counts: list[int],
    grad: Tensor,
    options: Fp8Options,
) -> dict[str, Tensor]:
    """Each expert by itself, with two matrices before SwiGLU, in float64."""
    made: dict[str, list[Tensor]] = {
        name: [] for name in ("y", "rows", "gate", "up", "down", "weights")
    }
    for e, (x, g, dy) in enumerate(
        zip(rows.split(counts), weights.split(counts), grad.split(counts), strict=True)
    ):
        gate_w, up_w, down_w = (weight64(stack[e], options) for stack in stacks)
        xq, factor = rows64(x, options), g.double()[:, None]
        gate, up = xq @ gate_w.T, xq @ up_w.T
        inner = gate / (1 + torch.exp(-gate)) * up * factor
        made["y"].append(rows64(inner, options) @ down_w.T)
        gate, up = rows64(gate, options), rows64(up, options)  # what was kept
        sigmoid = 1 / (1 + torch.exp(-gate))
        d_inner = gradient64(dy, options) @ down_w
        made["weights"].append((d_inner * gate * sigmoid * up).sum(1))
        d_gate = d_inner * factor * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        d_up = d_inner * factor * gate * sigmoid
        made["down"].append(
            columns64(dy, options).T @ columns64(gate * sigmoid * up * factor, options)
        )
        made["gate"].append(columns64(d_gate, options).T @ columns64(xq, options))
        made["up"].append(columns64(d_up, options).T @ columns64(xq, options))
        made["rows"].append(gradient64(d_gate, options) @ gate_w + gradient64(d_up, options) @ up_w)
    joined = {name: torch.cat(made[name]) for name in ("y", "rows", "weights")}
    return joined | {name: torch.stack(made[name]) for name in ("gate", "up", "down")}


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("counts", [[130, 0, 3], [1, 2, 0], [128, 128, 5]])
@pytest.mark.parametrize("widths", [(136, 72), (129, 130)])
def test_all_that_experts_compute(
    options: Fp8Options, counts: list[int], widths: tuple[int, int]
) -> None:
    dim, inner = widths
    num = len(counts)
    rows = random(sum(counts), dim).requires_grad_()
    gate_up = (random(num, 2 * inner, dim, seed=1) / 20).requires_grad_()
    down = (random(num, dim, inner, seed=2) / 20).requires_grad_()
    weights = torch.rand(sum(counts), generator=torch.Generator().manual_seed(3)).requires_grad_()
    grad = random(sum(counts), dim, seed=4)
    y = experts(rows, gate_up, down, weights, torch.tensor(counts), options)
    y.backward(grad)
    gate, up = gate_up.detach().chunk(2, dim=1)
    expected = expected_experts(
        rows.detach(), (gate, up, down.detach()), weights.detach(), counts, grad, options
    )
    # A value on the edge between two codes may fall either way: float32 against float64.
    close(y.detach(), expected["y"], 2e-3)
    assert rows.grad is not None
    assert gate_up.grad is not None
    assert down.grad is not None
    assert weights.grad is not None
    close(rows.grad, expected["rows"], 2e-3)
    close(gate_up.grad, torch.cat([expected["gate"], expected["up"]], dim=1), 2e-3)
    close(down.grad, expected["down"], 2e-3)
    close(weights.grad, expected["weights"], 2e-3)


def test_a_feed_forward_is_one_expert() -> None:
    x = random(2, 70, 50).requires_grad_()
    gate, up = random(30, 50, seed=1) / 7, random(30, 50, seed=2) / 7
    down = random(50, 30, seed=3) / 5
    twin = x.detach().clone().requires_grad_()
    options = Fp8Options()
    y = feed_forward(x, gate, up, down, options)
    ones, counts = torch.ones(140), torch.tensor([140])
    stacks = torch.cat([gate, up])[None], down[None]
    other = experts(twin.flatten(0, 1), *stacks, ones, counts, options)
    assert torch.equal(y.flatten(0, 1), other)
    y.square().sum().backward()
    other.square().sum().backward()
    assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]


def kept_bytes(make: object) -> int:
    """Of all tensors that autograd keeps, each storage once."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made = make()  # type: ignore[operator]
    assert made is not None
    return sum(sizes.values())


def test_what_is_kept_are_bytes() -> None:
    n, i, o = 256, 512, 128
    x, weight = random(n, i).requires_grad_(), random(o, i, seed=1).requires_grad_()
    scales_of_weight = 4 * (i // 128)
    found = kept_bytes(lambda: linear(x, weight, Fp8Options()))
    assert found == n * i + 4 * n * (i // 128) + o * i + scales_of_weight
    found = kept_bytes(lambda: linear(x, weight, Fp8Options(), keeps_e5m6=True))
    assert found == n * i * 3 // 2 + 4 * n * (i // 128) + o * i + scales_of_weight


def test_of_a_feed_forward_its_output_is_not_kept() -> None:
    n, d, i = 256, 128, 256
    x = random(n, d).requires_grad_()
    gate, up, down = (random(*shape, seed=1) for shape in ((i, d), (i, d), (d, i)))
    found = kept_bytes(lambda: feed_forward(x, gate, up, down, Fp8Options()))
    values, scales = n * d + 2 * n * i + 3 * d * i, 4 * (n + 2 * n * 2 + 3 * 2)
    assert found == values + scales + 8  # the one expert's count


def test_an_activation_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(x: Tensor, **options: bool) -> object:
        made.append(x)
        return quantise_rows(x, **options)

    monkeypatch.setattr(operands, "quantise_rows", counted)
    x, options = random(4, 8), Fp8Options()
    with torch.no_grad():
        first = linear(x, random(3, 8, seed=1), options)
        linear(x, random(5, 8, seed=2), options)
        assert len(made) == 1
        x.mul_(2)
        second = linear(x, random(3, 8, seed=1), options)
        assert len(made) == 2
        assert torch.equal(second, 2 * first)
        linear(x, random(3, 8, seed=1), Fp8Options(use_ue8m0=True))
    assert len(made) == 3


def test_frozen_parts_cost_nothing() -> None:
    x, weight = random(4, 8), random(3, 8, seed=1).requires_grad_()
    linear(x, weight, Fp8Options()).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    y = linear(x.requires_grad_(), weight.detach(), Fp8Options())
    weight.grad = None
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    x = random(4, 8).requires_grad_()
    y = linear(x, random(3, 8, seed=1), Fp8Options())
    with pytest.raises(Exception, match="FP8"):
        y.backward(torch.full((4, 3), math.nan))
