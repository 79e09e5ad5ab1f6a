"""Functions of tensors as kernels: torch's Inductor compiles them, once for each set of shapes.

`torch.compile` checks its guards at every call, 30 to 60 microseconds; a decode step makes hundreds
of calls that take little more. Here a shape is looked up and the generated code called (docs/log.md
has the figures), so a function may depend on nothing but its tensors' shapes, strides, dtypes and
values. The two entries of Inductor used here are not its public ones: torch's version is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rorqual.log import logger

log = logger("ops")

_building = threading.Lock()


class Compiled:
    """Calls `function` through kernels for the CPU; without gradients. See `can_compile`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._kernels: dict[Any, Callable[[list[Tensor]], Sequence[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        key = (torch.get_num_threads(), *[(t.shape, t.stride(), t.dtype) for t in tensors])
        kernel = self._kernels.get(key)
        if kernel is None:
            with _building:
                kernel = self._kernels[key] = self._build(tensors)
        return kernel(list(tensors))[0]

    def _build(self, tensors: tuple[Tensor, ...]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table

        _say_once()
        trace = make_fx(
            lambda *inputs: (self._function(*inputs),), select_decomp_table(), tracing_mode="fake"
        )
        graph = trace(*tensors)
        inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        # Shapes and strides are the key: to assert them at every call again would cost 2 us each.
        with torch.no_grad(), inductor.patch(size_asserts=False):
            return compile_fx_inner(graph, inputs).current_callable  # type: ignore[attr-defined]


@cache
def can_compile() -> bool:
    """Is there a C++ compiler that Inductor can use? To look for it takes a second or two."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@cache
def _say_once() -> None:
    log.info("compiling kernels: seconds each, kept on disk for next time")
