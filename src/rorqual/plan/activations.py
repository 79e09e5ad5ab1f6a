"""What the parts of a model keep for their backward pass, counted on tensors without memory.

The trainer's own modules run, with its precision and its choice of what is computed again
(`train/`), so the count follows whatever operators they have. One layer of each kind is enough.
"""

# B sequences, T positions, D hidden size, N = B * T

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.model import DeepseekV3, ModelConfig, empty
from rorqual.model.dispatch import LocalDispatcher
from rorqual.model.mla import MLA
from rorqual.ops.cross_entropy import BLOCK_ELEMENTS, BLOCK_ELEMENTS_CUDA
from rorqual.ops.kernels import for_training
from rorqual.plan.live import Live
from rorqual.train.precision import compute_in
from rorqual.train.recompute import Recompute, recompute


@dataclass(frozen=True)
class Load:
    """What one micro-batch is, and how it is computed."""

    num_sequences: int
    num_inputs: int
    precision: str
    recompute: Recompute
    is_cpu: bool
    num_experts: int  # of this rank: those of all ranks bring it as many rows as on one rank


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model for one micro-batch.

    `kept`: from its forward to its backward pass, its output included. `forward` and `backward`:
    the most that is there for a moment besides; `first_backward` where gradients are made and not
    added to, which are then in it. `gradients`: what stays of it for the optimizer.
    """

    kept: int
    forward: int
    backward: int
    first_backward: int
    gradients: int


@dataclass(frozen=True)
class Parts:
    """Those of a model. None where it has no such part."""

    embedding: Part
    dense: Part | None
    sparse: Part | None
    end: Part  # the last norm, the head and the loss
    mtp: Part | None  # one module, with its own pass through embedding and head

    def of_layer(self, config: ModelConfig, layer_id: int) -> Part:
        part = self.sparse if config.is_moe_layer(layer_id) else self.dense
        assert part is not None, "each kind of layer is counted"
        return part


@lru_cache(maxsize=16)
def count_parts(config: ModelConfig, load: Load) -> Parts:
    """Runs one layer of each kind there and back, twice: gradients are made, then added to."""
    num_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    has_dense, has_sparse = num_dense > 0, num_dense < config.num_hidden_layers
    small = config.with_changes(
        num_hidden_layers=has_dense + has_sparse,
        first_k_dense_replace=int(has_dense),
        num_nextn_predict_layers=min(config.num_nextn_predict_layers, 1),
    )
    # Tensors on the meta device take a GPU's path, and are quicker than those that stand for a
    # processor's.
    with _processor() if load.is_cpu else torch.device("meta"):
        model = DeepseekV3(small) if load.is_cpu else empty(small, device="meta").to("meta")
        _cut_experts(model, load.num_experts)
        model.train()
        recompute(model, load.recompute)
        compute_in(model, load.precision)
        if not load.is_cpu:
            _attend_without_scores(model)
        return _Counter(model, load).parts(has_dense, has_sparse)


def _processor() -> AbstractContextManager[Any]:
    """Tensors that say that they are on a CPU; to import what makes them takes a second."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


class _Counter:
    def __init__(self, model: DeepseekV3, load: Load) -> None:
        self.model, self.load = model, load
        shape = load.num_sequences, load.num_inputs
        self.tokens_BT = torch.zeros(shape, dtype=torch.int64)
        # The layers' operators as `train.loss.TrainingModel` has them.
        self.step = model.model.step(
            self.tokens_BT, balance=torch.zeros(()), training=for_training()
        )
        if load.num_experts < model.config.n_routed_experts:
            self.step = self.step._replace(dispatcher=_Shared())

    def parts(self, has_dense: bool, has_sparse: bool) -> Parts:
        body, config = self.model.model, self.model.config
        layers = list(body.layers.values())
        return Parts(
            embedding=self._count(lambda _: self._embedded()),
            dense=self._count(lambda x: layers[0](x, self.step)) if has_dense else None,
            sparse=self._count(lambda x: layers[has_dense](x, self.step)) if has_sparse else None,
            end=self._with_logits(self._count(self._end)),
            mtp=self._with_logits(self._count(self._mtp))
            if config.num_nextn_predict_layers
            else None,
        )

    def _embedded(self) -> Tensor:
        assert self.model.model.embed_tokens is not None, "the whole model is counted"
        embedded: Tensor = self.model.model.embed_tokens(self.tokens_BT)
        return embedded

    def _end(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """The loss, and the hidden states that the MTP modules go on from."""
        assert self.model.model.norm is not None, "the whole model is counted"
        norm, training = self.model.model.norm, self.step.training
        h_BTD = norm(x_BTD) if training is None else norm.trained(x_BTD, training)
        loss = self._loss(h_BTD)
        return (loss, h_BTD) if self.model.config.num_nextn_predict_layers else (loss,)

    def _mtp(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        h_BTD = self.model.mtp_hidden(1, x_BTD, self.tokens_BT, self.step)
        return self._loss(h_BTD), h_BTD

    def _loss(self, h_BTD: Tensor) -> Tensor:
        assert self.model.lm_head is not None, "the whole model is counted"
        targets_N = self.tokens_BT.flatten()
        loss: Tensor = self.model.lm_head(h_BTD.flatten(0, 1), targets_N, targets_N >= 0)
        return loss

    def _count(self, run: Callable[[Tensor], Any]) -> Part:
        first, later = self._pass(run), self._pass(run)
        self.model.zero_grad()
        return replace(first, backward=later.backward)

    def _pass(self, run: Callable[[Tensor], Any]) -> Part:
        width = self.model.config.hidden_size
        x_BTD = torch.zeros(*self.tokens_BT.shape, width, requires_grad=True)
        with Live() as live:
            out = run(x_BTD)
            kept, forward = live.now, live.most - live.now
            outs = out if isinstance(out, tuple) else (out,)
            live.restart()
            torch.autograd.backward(outs, [torch.ones_like(each) for each in outs])
            backward = live.most - kept
            del out, outs
            left = live.now
        gradient = 0 if x_BTD.grad is None else x_BTD.grad.nbytes
        return Part(kept, forward, backward, backward, max(0, left - gradient))

    def _with_logits(self, part: Part) -> Part:
        """What the head's operator takes within itself: a block of logits, their softmax and that
        rounded.
        """
        load, config = self.load, self.model.config
        limit = BLOCK_ELEMENTS if load.is_cpu else BLOCK_ELEMENTS_CUDA
        rows = min(max(64, limit // config.vocab_size), load.num_sequences * load.num_inputs)
        a_logit = 8 if load.precision == "float32" else 12
        return replace(part, forward=part.forward + rows * config.vocab_size * a_logit)


def _cut_experts(model: DeepseekV3, num_experts: int) -> None:
    """Leaves each sparse layer the experts of one rank. The router still knows all, and rows of a
    fake product need no expert.
    """
    for layer in model.sparse_layers():
        for name, parameter in list(layer.experts.named_parameters()):
            own = parameter.detach()[:num_experts].clone()
            setattr(layer.experts, name, nn.Parameter(own))


class _Shared:
    """Brings as many rows as stay away: what ranks that share experts compute by, whose layers do
    not take all operators of one rank.
    """

    def __init__(self) -> None:
        here = LocalDispatcher()
        self.dispatch, self.combine = here.dispatch, here.combine


class _Scoreless(torch.autograd.Function):
    """Keeps what a fused attention on a GPU keeps: its inputs, its output, and a float32 a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend_without_scores(model: DeepseekV3) -> None:
    for module in model.modules():
        if isinstance(module, MLA):
            module.kernels = replace(module.kernels, attention=_scoreless)


def _scoreless(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    out: Tensor = _Scoreless.apply(q, k, v)
    return out
