"""Which implementation serves what: a value, chosen once from what is stored and the machine.

`RULES` is the whole choice. A new kernel is one more `Kernels` and one more rule; `rorqual inspect`
prints what they give, and tests are parametrised by them. Every implementation differentiates, so
whoever chooses need not know whether a gradient will be wanted.
"""

# W is what holds a weight: a tensor, or a stack of matrices in the bytes of their file

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import UsageError, listing
from rorqual.ops import (
    attention,
    cross_entropy,
    decoded,
    grouped_gemm,
    linear,
    packed,
    rms_norm,
    widened,
)
from rorqual.ops.native import KINDS, library
from rorqual.ops.quant_types import READABLE
from rorqual.ops.training import attention as training_attention
from rorqual.ops.training import feed_forward, norm, route

AUTO = "auto"
FP8 = "F8_E4M3"
DENSE = ("float32", "bfloat16", "float16", "float64")
STORED = (FP8, *READABLE)
"""Storages: dtypes of tensors, and kinds of matrices in the bytes of their file."""

W = TypeVar("W")


@dataclass(frozen=True)
class Kernels(Generic[W]):
    """One implementation for each operation. The functions in `TORCH` say their shapes; `linear`
    maps x (..., I) to (..., O), in x's dtype.
    """

    name: str
    linear: Callable[[Tensor, W], Tensor]
    linear_float32: Callable[[Tensor, W], Tensor]
    logits: Callable[[Tensor, W], Tensor]
    head_linear: Callable[[Tensor, W], Tensor]
    grouped_gemm: Callable[[Tensor, W, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    linear_cross_entropy: Callable[[Tensor, W, Tensor, Tensor], Tensor]
    token_losses: Callable[[Tensor, W, Tensor], Tensor]

    def __deepcopy__(self, memo: object) -> Kernels[W]:
        return self

    def __reduce__(self) -> tuple[Callable[[str], Kernels[Any]], tuple[str]]:
        return named, (self.name,)


# torch's operators follow their tensors to any device. What its two attentions and its grouped
# products do on a GPU is chosen there by the operands, sizes among them, so it is not chosen here.
TORCH: Kernels[Tensor] = Kernels(
    "torch",
    F.linear,
    linear.linear_float32,
    linear.logits,
    linear.head_linear,
    grouped_gemm.grouped_gemm,
    attention.attention,
    rms_norm.rms_norm,
    cross_entropy.linear_cross_entropy,
    cross_entropy.token_losses,
)
# The oracle of all others: the shortest code that is right.
PLAIN: Kernels[Tensor] = Kernels(
    "plain",
    F.linear,
    linear.linear_float32,
    linear.logits,
    linear.head_linear_plain,
    grouped_gemm.grouped_gemm_plain,
    attention.attention_plain,
    rms_norm.rms_norm_plain,
    cross_entropy.linear_cross_entropy_plain,
    cross_entropy.token_losses_plain,
)


WIDENED: Kernels[Tensor] = Kernels(
    "widened",
    widened.linear,
    widened.linear_float32,
    widened.linear_float32,
    widened.head_linear,
    widened.grouped_gemm,
    widened.attention,
    rms_norm.rms_norm,
    cross_entropy.linear_cross_entropy,
    cross_entropy.token_losses,
)
# Norms of such a model are float32, and so is what it attends to.
DECODED: Kernels[decoded.Stack] = Kernels(
    "decoded",
    decoded.linear,
    decoded.linear_float32,
    decoded.linear_float32,
    decoded.head_linear,
    decoded.grouped_gemm,
    attention.attention,
    rms_norm.rms_norm,
    decoded.linear_cross_entropy,
    decoded.token_losses,
)


@dataclass(frozen=True)
class TrainingKernels:
    """One implementation for each operator of a training step; the plain functions in
    `ops/training/` say their shapes. Parameters are float32, products of their input's dtype.
    """

    name: str
    norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor, Tensor]]
    feed_forward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    routed: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], Tensor]
    route: Callable[..., tuple[Tensor, Tensor, Tensor]]
    latent_attention: Callable[..., Tensor]


NATIVE_TRAINING = TrainingKernels(
    "native",
    norm.norm,
    norm.add_norm,
    feed_forward.feed_forward,
    feed_forward.routed,
    route.route,
    training_attention.latent_attention,
)


def for_training() -> TrainingKernels | None:
    """What computes a training step on this machine's CPU in float32 parameters; None: the layers
    as they are, by their own kernels.
    """
    return None if library() is None else NATIVE_TRAINING


# Those of the C++ library, for what `model.served` packs for them.
NATIVE: Kernels[packed.PackedStack] = Kernels(
    "native",
    packed.linear,
    packed.linear_float32,
    packed.linear_float32,
    packed.head_linear,
    packed.grouped_gemm,
    attention.attention,
    rms_norm.rms_norm,
    packed.linear_cross_entropy,
    packed.token_losses,
)


@dataclass(frozen=True)
class Machine:
    """What a choice depends on besides the storage.

    `device` is a kind: cpu, cuda. `has_bfloat16`: its processor multiplies bfloat16. `has_native`:
    the package's C++ kernels were built.
    """

    device: str
    has_bfloat16: bool
    has_native: bool = False

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The machine that this runs on; looked at once."""
        return _machine(device.type)


@cache
def _machine(kind: str) -> Machine:
    if kind != "cpu":
        return Machine(kind, True)
    # torch without oneDNN has neither the question nor products of bfloat16 that are worth having.
    has_onednn = torch.backends.mkldnn.is_available()
    has_bfloat16 = has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Machine(kind, has_bfloat16, has_native=library() is not None)


@dataclass(frozen=True)
class Rule:
    """`kernels` can serve these storages, on these kinds of device (None: any), and are wanted
    there unless `has_no_bfloat16` says that they pay only where the processor has none.
    """

    kernels: Kernels[Any]
    storages: tuple[str, ...]
    devices: tuple[str, ...] | None = None
    has_no_bfloat16: bool = False
    needs_native: bool = False

    def can_serve(self, storage: str, machine: Machine) -> bool:
        return (
            storage in self.storages
            and (self.devices is None or machine.device in self.devices)
            and (not self.needs_native or machine.has_native)
        )

    def pays(self, machine: Machine) -> bool:
        return not (self.has_no_bfloat16 and machine.has_bfloat16)


# The first that can serve and pays is chosen.
RULES = (
    Rule(WIDENED, ("bfloat16",), ("cpu",), has_no_bfloat16=True),
    Rule(TORCH, DENSE),
    Rule(PLAIN, DENSE),
    Rule(NATIVE, tuple(KINDS), ("cpu",), needs_native=True),
    Rule(DECODED, STORED, ("cpu",)),
)
NAMES = tuple(rule.kernels.name for rule in RULES)
OPERATIONS = tuple(f.name for f in fields(Kernels) if f.name != "name")


def choose(storage: str, machine: Machine, name: str = AUTO) -> Kernels[Any]:
    """The kernels for what is stored so; those called `name` wherever they can serve.

    UsageError for an unknown name, or where nothing serves the storage.
    """
    if name != AUTO:
        named(name)
    able = [rule for rule in RULES if rule.can_serve(storage, machine)]
    for rule in able:
        if rule.kernels.name == name:
            return rule.kernels
    for rule in able:
        if rule.pays(machine):
            return rule.kernels
    raise UsageError(
        f"nothing multiplies weights that are stored as {storage}",
        found=f"the device {machine.device}",
        fix="load them as float32 or bfloat16",
    )


def named(name: str) -> Kernels[Any]:
    """The kernels of that name; UsageError for another."""
    for rule in RULES:
        if rule.kernels.name == name:
            return rule.kernels
    raise UsageError(f"unknown kernels {name!r}", expected=listing((AUTO, *NAMES)))


def serving(kernels: Kernels[Any], operation: str) -> str:
    """The name of the kernels whose implementation of an operation this is: some have torch's."""
    implementation = getattr(kernels, operation)
    is_torchs = implementation == getattr(TORCH, operation)
    return TORCH.name if is_torchs else kernels.name


def storage_of(weight: Tensor) -> str:
    """A tensor's dtype, as `choose` calls it."""
    return str(weight.dtype).removeprefix("torch.")
