"""RMSNorm and MLA's up-projections computed again in the backward pass (report §3.2.3), applied
to a model from outside.

While a layer runs forward, what autograd would keep passes through `Recorder.pack`. What a
recomputed *segment* made is not kept: in its place stands how to run the segment again, from what
is kept anyway. Attention, experts and down-projections run once. A segment is

* a norm, from its input;
* of MLA all between the down-projections' outputs and attention's inputs: the norms of the latents,
  the up-projections, rotation, joining; so attention keeps no queries, keys and values;
* of an MTP module the two norms and their joining, from what it was given;
* a norm's output rounded for a product in bfloat16.

A segment runs again once, for all that asks for what it made, and calls the very code of the model,
so that it knows nothing of its operators. torch.compile has a choice of its own of what it computes
again, and does not see this one: the recipe refuses both together. The fused operators of a CPU
(`ops/training/`), which keep no more than inputs anyway, have no such segments: they are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rorqual.model import DeepseekV3
from rorqual.model.block import Block
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.mla import MLA
from rorqual.model.mtp import MtpModule
from rorqual.model.step import Step


class _Enough(Exception):  # noqa: N818
    """A segment that runs again has all that it is to make."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = outputs


class Segment:
    """A part of a layer that can run again. `run` makes its outputs from what it holds; `kept` are
    the outputs of modules that lie within it and do not run again.
    """

    def __init__(self, run: Callable[[], Sequence[Tensor]]) -> None:
        self.run = run
        self.kept: dict[nn.Module, Tensor] = {}
        self.num_saved = 0
        self.num_wanted = self.num_taken = 0
        self._made: tuple[list[Tensor], list[Tensor]] | None = None

    def save(self) -> Saved:
        """In place of the next tensor that autograd would keep of the segment."""
        self.num_saved += 1
        self.num_wanted += 1
        return Saved(self, self.num_saved - 1)

    def take(self, index: int) -> Tensor:
        """What autograd kept, or with ~index an output; made once for all that want it."""
        if self._made is None:
            self._made = self._run_again()
        saved, outputs = self._made
        self.num_taken += 1
        if self.num_taken == self.num_wanted:
            self._made, self.num_taken = None, 0
        return saved[index] if index >= 0 else outputs[~index]

    def _run_again(self) -> tuple[list[Tensor], list[Tensor]]:
        kept: list[Tensor] = []

        # Autograd holds on to this function: it must not hold on to what autograd made.
        def collect(tensor: Tensor) -> Tensor:
            kept.append(tensor.detach())
            return kept[-1]

        token = _current.set(_Again(self.kept))
        try:
            with torch.enable_grad(), saved_tensors_hooks(collect, lambda tensor: tensor):
                outputs = [output.detach() for output in self.run()]
        finally:
            _current.reset(token)
        saved = list(kept)
        kept.clear()
        assert len(saved) == self.num_saved, "a segment that runs again keeps what it kept before"
        return saved, outputs


class Saved(NamedTuple):
    """Stands for a tensor that is not kept: by its number, or a view of an output."""

    segment: Segment
    place: int
    view: tuple[Sequence[int], Sequence[int], int] | None = None

    def tensor(self) -> Tensor:
        made = self.segment.take(self.place)
        return made if self.view is None else made.as_strided(*self.view)


class _Again:
    """Seen by the modules of a segment that runs again."""

    def __init__(self, kept: dict[nn.Module, Tensor]) -> None:
        self.kept = kept


class Recorder:
    """Of one layer's forward pass: which segment runs, and which tensors earlier ones made. These
    are held until the layer ends, so that no other tensor can have their place in memory.
    """

    def __init__(self) -> None:
        self.segment: Segment | None = None
        self._made: dict[int, tuple[Segment, int, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        """What autograd keeps in place of a tensor. Of what an operator keeps of its own output a
        detached one, which does not hold on to the operator.
        """
        if self.segment is not None:
            return self.segment.save()
        found = self._made.get(_place(tensor))
        if found is None:
            return tensor.detach()
        segment, index, _ = found
        segment.num_wanted += 1
        return Saved(segment, index, (tensor.size(), tensor.stride(), int(tensor.storage_offset())))

    def begin(self, run: Callable[[], Sequence[Tensor]]) -> Segment:
        assert self.segment is None, "one segment at a time"
        self.segment = Segment(run)
        return self.segment

    def end(self, outputs: Sequence[Tensor]) -> None:
        assert self.segment is not None, "a segment ends after it began"
        for number, output in enumerate(outputs):
            self._made[_place(output)] = self.segment, ~number, output
        self.segment = None

    def forget(self) -> None:
        """The layer has ended; hooks that autograd keeps know this recorder."""
        self._made.clear()

    def has_made(self, tensor: Tensor) -> bool:
        return self.segment is None and _place(tensor) in self._made

    def outside(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs a module that lies within a segment and does not run again."""
        segment, self.segment = self.segment, None
        assert segment is not None, "what does not run again lies within a segment"
        out = forward(x)
        segment.kept[module] = _as_given(out)
        self.segment = segment
        return out


_current: ContextVar[Recorder | _Again | None] = ContextVar("recompute", default=None)


def _place(tensor: Tensor) -> int:
    """Names the memory that a tensor is a view of."""
    return tensor.untyped_storage()._cdata


def _unpack(kept: Tensor | Saved) -> Tensor:
    return kept.tensor() if isinstance(kept, Saved) else kept


def _as_given(tensor: Tensor) -> Tensor:
    """What a segment begins with, cut off from what made it."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Recorded(nn.Module):
    """A layer whose forward pass is recorded."""

    def forward(self, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*inputs)
        recorder = Recorder()
        token = _current.set(recorder)
        try:
            with saved_tensors_hooks(recorder.pack, _unpack):
                return super().forward(*inputs)
        finally:
            _current.reset(token)
            recorder.forget()


class ThriftyBlock(_Recorded, Block):
    """A block that keeps neither what its norms nor what MLA's up-projections made."""


class _JoiningModule(MtpModule):
    """What precedes `eh_proj` is a segment."""

    def forward(self, h_BTD: Tensor, embedding_BTD: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        recorder = _current.get()
        if isinstance(recorder, Recorder):
            given = _as_given(h_BTD), _as_given(embedding_BTD)
            recorder.begin(lambda: _until_enough(lambda: MtpModule.forward(self, *given, step)))
        return super().forward(h_BTD, embedding_BTD, step)


class ThriftyMtpModule(_Recorded, _JoiningModule):
    """An MTP module that keeps none of those, nor what it joins."""


class ThriftyNorm(RMSNorm):
    """A segment, unless it lies in one."""

    def forward(self, x: Tensor) -> Tensor:
        recorder = _current.get()
        if not isinstance(recorder, Recorder) or recorder.segment is not None:
            return super().forward(x)
        given = _as_given(x)
        recorder.begin(lambda: [RMSNorm.forward(self, given)])
        out = super().forward(x)
        recorder.end([out])
        return out


class ThriftyLinear(Linear):
    """Does not keep a norm's output that it rounds."""

    def forward(self, x: Tensor) -> Tensor:
        recorder, dtype = _current.get(), self.compute_dtype
        is_rounded = dtype is not None and dtype != x.dtype
        if is_rounded and isinstance(recorder, Recorder) and recorder.has_made(x):
            kept = recorder.pack(x)
            recorder.begin(lambda: [_unpack(kept).to(dtype)])
            x = x.to(dtype)
            recorder.end([x])
        return super().forward(x)


class ThriftyDown(ThriftyLinear):
    """A down-projection of MLA: its output is kept, and it does not run again."""

    def forward(self, x: Tensor) -> Tensor:
        recorder = _current.get()
        if isinstance(recorder, _Again):
            return recorder.kept[self]
        if recorder is None:
            return super().forward(x)
        return recorder.outside(self, super().forward, x)


class ThriftyJoin(ThriftyLinear):
    """`eh_proj`: where the first segment of an MTP module ends."""

    def forward(self, x: Tensor) -> Tensor:
        _end_segment([x])
        return super().forward(x)


class ThriftyMLA(MLA):
    """Between its down-projections and its attention lies one segment."""

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        recorder = _current.get()
        if not isinstance(recorder, Recorder):
            return super().forward(x_BTD, step)
        # Of x, which the down-projections alone read, only the shape is there when it runs again.
        shape_BTD = x_BTD.detach().new_empty(1).expand(x_BTD.shape)
        recorder.begin(lambda: _until_enough(lambda: self._forward(shape_BTD, step)))
        return self._forward(x_BTD, step)

    def _forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        """With an attention that ends the segment."""
        chosen = self.kernels

        def attention(*given: Any) -> Tensor:
            _end_segment([one for one in given if isinstance(one, Tensor) and one.requires_grad])
            return chosen.attention(*given)

        self.kernels = replace(chosen, attention=attention)
        try:
            return MLA.forward(self, x_BTD, step)
        finally:
            self.kernels = chosen


def _end_segment(outputs: Sequence[Tensor]) -> None:
    recorder = _current.get()
    if isinstance(recorder, _Again):
        raise _Enough(outputs)
    if recorder is not None:
        recorder.end(outputs)


def _until_enough(run: Callable[[], Any]) -> Sequence[Tensor]:
    try:
        run()
    except _Enough as found:
        return found.outputs
    raise AssertionError("the segment's end was not reached")


def recompute_norms(model: DeepseekV3) -> None:
    """In all layers, MTP modules included, while the model trains."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        RMSNorm: ThriftyNorm,
        Linear: ThriftyLinear,
        MLA: ThriftyMLA,
    }
    model.model.is_fusable = False
    for layer in model.model.layers.values():
        for module in layer.modules():
            module.__class__ = kinds.get(type(module), type(module))
        for name in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa"):
            if (down := getattr(layer.self_attn, name, None)) is not None:
                down.__class__ = ThriftyDown
        if isinstance(layer, MtpModule):
            layer.eh_proj.__class__ = ThriftyJoin
        layer.__class__ = ThriftyMtpModule if isinstance(layer, MtpModule) else ThriftyBlock
