"""The operations of a training step (`train.h`): their structs, and the call."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from rorqual.ops.native.library import library

_NO_MEMORY = 3
OPERATIONS = (
    "norm", "norm_grad", "swiglu", "swiglu_grad", "gather", "scatter", "sort", "cross_entropy",
    "route", "route_grad", "attend", "attend_grad", "rope_grad",
)  # fmt: skip
NORM_ROWS = 64
"""Rows of an item of norm_grad."""
MOST_EXPERTS = 1024


class Rows(ctypes.Structure):
    """A matrix whose rows may lie apart, float32 or bfloat16."""

    _fields_ = [("p", c_void_p), ("stride", c_int64), ("is_half", c_int64)]


def _fields(
    rows: str = "", pointers: str = "", numbers: str = "", reals: str = ""
) -> list[tuple[str, type]]:
    return [
        *((name, Rows) for name in rows.split()),
        *((name, c_void_p) for name in pointers.split()),
        *((name, c_int64) for name in numbers.split()),
        *((name, c_double) for name in reals.split()),
    ]


class Norm(ctypes.Structure):
    _fields_ = _fields("x add sum y other", "weight rstd", "width", "eps")


class NormGrad(ctypes.Structure):
    _fields_ = _fields("dy dother dsum x dx", "weight rstd dweight", "width num_rows")


class Swiglu(ctypes.Structure):
    _fields_ = _fields("gate up out", "by", "width")


class SwigluGrad(ctypes.Structure):
    _fields_ = _fields("gate up dout dgate dup inner", "by dby", "width")


class Move(ctypes.Structure):
    _fields_ = _fields("x out", "index", "num width")


class Sort(ctypes.Structure):
    _fields_ = _fields("", "experts order counts", "num num_experts whole")


class CrossEntropy(ctypes.Structure):
    _fields_ = _fields("logits", "targets marks losses", "width")


class Route(ctypes.Structure):
    _fields_ = _fields(
        "",
        "logits bias dweights dscores weights scores dlogits experts",
        "num_experts num_chosen num_groups kept_groups best_of_group is_softmax is_normalised",
        "scale",
    )


class Attend(ctypes.Structure):
    _fields_ = _fields(
        "q kv rope out dout dq dkv",
        "cos sin documents lse drope",
        "num_tokens num_heads nope turned value angles",
        "scale",
    )


_CODES = {name: code for code, name in enumerate(OPERATIONS)}
_NO_ROWS = Rows()


def rows(matrix: Tensor | None) -> Rows:
    """A matrix (N, D) whose rows are whole, as the library takes it; None: none."""
    if matrix is None:
        return _NO_ROWS
    return Rows(matrix.data_ptr(), matrix.stride(0), matrix.dtype is torch.bfloat16)


def address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


def run(operation: str, arguments: ctypes.Structure, num_items: int) -> None:
    """Does it to so many items, on torch's threads. MemoryError where it got no memory."""
    loaded = library()
    assert loaded is not None, "who asks for these kernels has seen that they were built"
    loaded.rq_set_threads(torch.get_num_threads())
    status = loaded.rq_train(_CODES[operation], byref(arguments), num_items)
    if status == _NO_MEMORY:
        raise MemoryError(f"the C++ kernels got no memory for {operation}")
    assert status == 0, f"the C++ kernels refuse {operation}: status {status}"
