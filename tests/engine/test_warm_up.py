"""After `warm_up` no step waits for a compiler in the experts' kernel for few rows.

Oracle: the list of what was built. Nothing is compiled here: a kernel is the function itself, and
the model has the kernels of weights that are widened, whatever the processor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from small_models import CONFIG
from torch import Tensor

from rorqual.engine import Engine
from rorqual.engine.flat_step import Span
from rorqual.model import DeepseekV3, build
from rorqual.model.served import Served
from rorqual.ops.compiled import Compiled
from rorqual.ops.kernels import widened_kernels
from rorqual.ops.widened import FEW_ROWS, GATHER_ROWS, WidenedByRows
from rorqual.tokenizer import Tokenizer


class Uncompiled(Compiled):
    """Builds nothing, but notes the shapes that it would have built for, and each call."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__(function)
        self.built: list[tuple[torch.Size, ...]] = []
        self.num_calls = 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        self.num_calls += 1
        return super().__call__(*tensors)

    def _build(self, tensors: tuple[Tensor, ...]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        self.built.append(tuple(tensor.shape for tensor in tensors))
        return lambda inputs: [self._function(*inputs)]


def give(model: DeepseekV3) -> Uncompiled:
    """The experts' kernel, after the model got kernels as on a processor without bfloat16."""
    ways = WidenedByRows(Uncompiled)
    for part in model.modules():
        if isinstance(part, Served):
            part.take(widened_kernels("uncompiled", ways))
    assert isinstance(ways._expert_rows, Uncompiled)
    return ways._expert_rows


def spread(num_choices: int) -> DeepseekV3:
    """So many experts that no one of them has many rows."""
    config = CONFIG.with_changes(
        n_routed_experts=32, num_experts_per_tok=num_choices, num_nextn_predict_layers=0
    )
    return build(config, seed=3).bfloat16().eval()


@pytest.mark.parametrize("num_choices", [1, 2, 6])
def test_no_step_builds_what_warm_up_did_not(tokenizer: Tokenizer, num_choices: int) -> None:
    """Steps of 1 to 64 tokens, in another thread than the warming up."""
    engine = Engine(spread(num_choices), tokenizer, max_batch=64)
    kernel = give(engine.model)
    warming = threading.Thread(target=engine.warm_up)
    warming.start()
    warming.join()
    built = list(kernel.built)
    assert len(set(built)) == len(built) > 0
    for num_tokens in range(1, 65):
        before = kernel.num_calls
        engine._runner.run([Span([5 + n], 0, [n]) for n in range(num_tokens)])
        if num_tokens * num_choices > GATHER_ROWS:
            assert kernel.num_calls == before
        elif num_tokens * num_choices <= FEW_ROWS:
            assert kernel.num_calls == before + 2, "two products in the one layer of experts"
        assert kernel.built == built, num_tokens


def test_without_warm_up_steps_build(tokenizer: Tokenizer) -> None:
    """So the test above can fail."""
    engine = Engine(spread(2), tokenizer)
    kernel = give(engine.model)
    engine._runner.run([Span([5], 0, [0])])
    assert len(kernel.built) == 2


def test_where_experts_take_another_way_nothing_is_built(tokenizer: Tokenizer) -> None:
    """A batch-invariant engine, whose experts never have few rows."""
    engine = Engine(spread(2), tokenizer, is_batch_invariant=True)
    kernel = give(engine.model)
    engine.warm_up()
    assert kernel.built == []
