"""Every row of the table of kernels, and the choice as data.

Oracle: the plain twins in float32, with autograd's gradients.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.errors import UsageError
from rorqual.model.stored import StoredStack
from rorqual.ops import kernels as kernels_module
from rorqual.ops import native
from rorqual.ops.block_fp8 import quantise_blocks
from rorqual.ops.kernels import (
    AUTO,
    DECODED,
    DENSE,
    FP8,
    NAMES,
    NATIVE,
    OPERATIONS,
    PLAIN,
    RULES,
    STORED,
    TORCH,
    WIDENED,
    Kernels,
    Machine,
    choose,
    named,
    serving,
)
from rorqual.ops.quant_types import CODED
from rorqual.ops.quantise import encode_blocks

ROWS = [0, 1, 2, 8, 9, 24, 25]
# Of a whole result. float32: sums in another order; bfloat16: inputs of products and results are
# rounded to 2^-9, in torch's attention the scores too.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "float64": 1e-6}
HAS_NO_GRADIENT = ("token_losses",)

KERNELS: dict[str, Kernels[Any]] = {rule.kernels.name: rule.kernels for rule in RULES}
SERVED = [
    (rule.kernels.name, storage)
    for rule in RULES
    for storage in rule.storages
    if storage in TOLERANCES
]


def inputs_of(operation: str, num_rows: int) -> tuple[list[Tensor], list[Any]]:
    """Floating inputs in float32, the weight second, and what else the operation takes."""
    generator = torch.Generator().manual_seed(num_rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    targets_N = torch.arange(num_rows) % 40
    if operation in ("linear", "linear_float32", "logits"):
        return [random(num_rows, 96), random(40, 96)], []
    if operation == "head_linear":
        return [random(num_rows, 4, 32), random(4, 48, 32)], []
    if operation == "grouped_gemm":  # the first and the last two of five experts have no rows
        counts_E = torch.tensor([0, num_rows - num_rows // 3, num_rows // 3, 0, 0])
        return [random(num_rows, 32), random(5, 24, 32)], [counts_E]
    if operation == "attention":
        shapes = (1, 2, num_rows, 16), (1, 2, num_rows + 3, 16), (1, 2, num_rows + 3, 8)
        return [random(*shape) for shape in shapes], [None, 0.3]
    if operation == "rms_norm":
        return [random(num_rows, 64), random(64)], [1e-6]
    if operation == "linear_cross_entropy":
        return [random(num_rows, 32), random(40, 32)], [targets_N, targets_N % 3 > 0]
    assert operation == "token_losses", f"no inputs for {operation}"
    return [random(num_rows, 32), random(40, 32)], [targets_N]


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    gap = (found.detach().double() - expected.detach().double()).norm()
    assert gap <= tolerance * expected.detach().double().norm(), what


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("name", "storage"), SERVED)
def test_every_row_of_the_table_is_its_plain_twin(
    name: str, storage: str, operation: str, num_rows: int
) -> None:
    """Values, and gradients of every floating input, whatever the mode."""
    floats, others = inputs_of(operation, num_rows)
    rounded = [tensor.to(getattr(torch, storage)) for tensor in floats]
    wide = [tensor.float().requires_grad_() for tensor in rounded]
    given = [tensor.clone().requires_grad_() for tensor in rounded]
    run = getattr(KERNELS[name], operation)
    expected = getattr(PLAIN, operation)(*wide, *others)
    y = run(*given, *others)
    tolerance = TOLERANCES[storage]
    assert_near(y, expected, tolerance, operation)
    with torch.inference_mode():
        same = run(*[tensor.clone() for tensor in rounded], *others)
        assert torch.equal(same, y)
        assert same.dtype == y.dtype
    if operation in HAS_NO_GRADIENT:
        assert not y.requires_grad
        return
    assert y.requires_grad
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    found = torch.autograd.grad(y, given, grad)
    wanted = torch.autograd.grad(expected, wide, grad.float())
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.dtype == given[number].dtype
        assert_near(ours, theirs, 2 * tolerance, f"{operation}: gradient {number}")


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_frozen_input_gets_no_gradient(wanted: int) -> None:
    """As with an adapter over a frozen base, or a head that learns over frozen states."""
    floats, _ = inputs_of("linear", 5)
    given = [tensor.bfloat16().requires_grad_(i == wanted) for i, tensor in enumerate(floats)]
    y = WIDENED.linear(*given)
    y.sum().backward()
    assert [tensor.grad is not None for tensor in given] == [wanted == 0, wanted == 1]
    with torch.no_grad():
        assert not WIDENED.linear(*given).requires_grad


def stack_of(kind: str, values_EOI: Tensor) -> StoredStack:
    num, rows, columns = values_EOI.shape
    if kind == FP8:
        stack = StoredStack(kind, (num, rows, columns), columns, (128, 128))
        assert stack.scales_EXY is not None
        for index, values in enumerate(values_EOI):
            codes, scales = quantise_blocks(values)
            stack.codes_EOB[index] = codes.view(torch.uint8)
            stack.scales_EXY[index] = scales
        return stack
    raw = encode_blocks(values_EOI.flatten(0, 1), kind).view(num, rows, -1)
    stack = StoredStack(kind, (num, rows, columns), raw.shape[2], (128, 128))
    stack.codes_EOB.copy_(raw)
    return stack


STORED_OPERATIONS = [name for name in OPERATIONS if name not in ("attention", "rms_norm")]


@pytest.mark.parametrize("num_rows", [0, 1, 9])
@pytest.mark.parametrize("operation", STORED_OPERATIONS)
@pytest.mark.parametrize("kind", [FP8, *CODED])
def test_stored_weights_multiply_as_their_decoded_values(
    kind: str, operation: str, num_rows: int
) -> None:
    floats, others = inputs_of(operation, num_rows)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*floats[0].shape[:-1], 256, generator=generator)
    weight = torch.randn(*floats[1].shape[:-1], 256, generator=generator)
    is_stack = weight.dim() == 3
    stack = stack_of(kind, weight if is_stack else weight[None])
    dense = torch.stack([stack.dense(index) for index in range(stack.shape[0])])
    results = []
    for kernels, held in ((stack.kernels, stack), (PLAIN, dense if is_stack else dense[0])):
        given = x.clone().requires_grad_()
        y = getattr(kernels, operation)(given, held, *others)
        gradients = ()
        if operation not in HAS_NO_GRADIENT:
            gradients = torch.autograd.grad(y, given, torch.ones_like(y))
        results.append((y, *gradients))
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted, TOLERANCES["float32"], operation)


MACHINES = [
    Machine(device, has_bfloat16)
    for device in ("cpu", "cuda", "meta")
    for has_bfloat16 in (True, False)
]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_choice_is_a_table(machine: Machine) -> None:
    is_old = machine.device == "cpu" and not machine.has_bfloat16
    for storage in DENSE:
        expected: Kernels[Any] = TORCH
        if storage == "bfloat16" and is_old:
            expected = WIDENED
        assert choose(storage, machine) is expected, storage
    for storage in STORED:
        if machine.device == "cpu":
            assert choose(storage, machine) is DECODED, storage
        else:
            with pytest.raises(UsageError, match=storage):
                choose(storage, machine)


@pytest.mark.parametrize(
    ("storage", "machine", "name", "expected"),
    [
        # Another machine's path, where it can serve at all.
        ("bfloat16", Machine("cpu", True), "widened", WIDENED),
        ("bfloat16", Machine("cpu", False), "torch", TORCH),
        ("bfloat16", Machine("cuda", True), "widened", TORCH),
        ("float32", Machine("cpu", False), "widened", TORCH),
        ("float32", Machine("cuda", True), "plain", PLAIN),
        ("Q4_K", Machine("cpu", True), "torch", DECODED),
        ("Q4_K", Machine("cpu", True), "native", DECODED),
        ("Q4_K", Machine("cpu", True, has_native=True), "native", NATIVE),
        ("BF16", Machine("cpu", True, has_native=True), AUTO, NATIVE),
        ("BF16", Machine("cpu", True), AUTO, DECODED),
        ("Q5_K", Machine("cpu", True, has_native=True), "native", DECODED),
        ("bfloat16", Machine("cpu", True, has_native=True), "native", TORCH),
    ],
)
def test_a_path_can_be_forced(
    storage: str, machine: Machine, name: str, expected: Kernels[Any]
) -> None:
    assert choose(storage, machine, name) is expected


def test_names_are_known() -> None:
    assert len(set(NAMES)) == len(RULES)
    assert AUTO not in NAMES
    for name in NAMES:
        assert named(name).name == name
    with pytest.raises(UsageError, match="unknown kernels 'wide'") as caught:
        choose("float32", Machine("cpu", True), "wide")
    assert all(known in str(caught.value) for known in NAMES)


def test_what_serves_an_operation_is_named() -> None:
    for operation in OPERATIONS:
        assert serving(TORCH, operation) == "torch"
    assert serving(WIDENED, "linear") == "widened"
    assert serving(WIDENED, "rms_norm") == "torch"
    assert serving(DECODED, "attention") == "torch"
    assert serving(DECODED, "grouped_gemm") == "decoded"


def test_kernels_are_values() -> None:
    """A model that is copied, or rebuilt from what it reduces to, has the same ones."""
    for name in NAMES:
        kernels = named(name)
        assert copy.deepcopy(kernels) is kernels
        assert copy.copy(kernels) is kernels


def test_the_machine_is_this_one() -> None:
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    has_native = native.library() is not None
    assert Machine.of(torch.device("cpu")) == Machine("cpu", has_bfloat16, has_native)
    assert Machine.of(torch.device("cuda", 0)) == Machine("cuda", True)


def test_a_torch_without_onednn_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some ARM machines, where the question itself is missing."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not kernels_module._machine.__wrapped__("cpu").has_bfloat16


@pytest.mark.parametrize(("asked", "is_known"), [("", True), ("avx2", True), ("none", False)])
def test_a_level_that_is_none_is_told(
    asked: str, is_known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else who mistypes it measures what was not meant."""
    if native.library() is None:
        pytest.skip("no C++ compiler built the kernels")
    monkeypatch.setenv("RORQUAL_CPU", asked)
    assert native.library.__wrapped__() is not None
    told = [record.getMessage() for record in caplog.records]
    assert told == ([] if is_known else [
        "RORQUAL_CPU=none is unknown, so it is not heeded: avx512, avx2, portable"
    ])  # fmt: skip
