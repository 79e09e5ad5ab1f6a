"""Bytes of weights that a step reads, in the form in which they run.

Counted by names: a live model's, a Hugging Face folder's or a GGUF file's. A step reads all but the
input embedding (a row a token), and of the routed experts only those that its tokens visit. MTP
layers, which drafts alone read, are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from rorqual.bench.figures import Work
from rorqual.engine.cache_formats import CacheDtype, bytes_per_token
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.flops import distinct_experts, forward_flops_per_token, prompt_flops
from rorqual.model.served import Served
from rorqual.ops.ceilings import operands_of
from rorqual.weights.gguf.file import read_gguf
from rorqual.weights.open import open_source

_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.|_exps\.")
_EMBEDDING = ("model.embed_tokens.", "token_embd.")
_HEAD = ("lm_head.", "output.weight")
MENTIONED_SHARE = 0.05  # of the bytes


@dataclass(frozen=True)
class Form:
    """How weights run: bytes of all that every step reads (`fixed`) and of one expert in each
    sparse layer together, the storages that hold most, and what is multiplied.
    """

    fixed: float
    one_expert: float
    storages: str
    operands: str
    kernels: str = ""

    def step_bytes(self, experts: float) -> float:
        """A step's, where a layer's tokens visit that many experts, the mean of the layers."""
        return self.fixed + self.one_expert * experts


@dataclass(frozen=True)
class Stored:
    """One tensor: its name, how it is stored, by which kernels it is multiplied."""

    name: str
    storage: str
    num_bytes: float
    kernels: str = ""


def form_of(config: ModelConfig, tensors: Iterable[Stored]) -> Form:
    """The form of a model with these tensors."""
    tensors = [t for t in tensors if _layer(t.name) < config.num_hidden_layers]
    has_head = any(t.name.startswith(_HEAD) for t in tensors)
    read = [t for t in tensors if not (has_head and t.name.startswith(_EMBEDDING))]
    experts = sum(t.num_bytes for t in read if _EXPERT.search(t.name))
    by_storage, by_kernels = Counter[str](), Counter[str]()
    for tensor in read:
        by_storage[tensor.storage] += round(tensor.num_bytes)
        by_kernels[tensor.kernels] += round(tensor.num_bytes)
    total = by_storage.total()
    most = [s for s, num in by_storage.most_common() if num >= MENTIONED_SHARE * total]
    kernels = by_kernels.most_common(1)[0][0]
    return Form(
        fixed=total - experts,
        one_expert=experts / config.n_routed_experts,
        storages="+".join(most),
        operands=operands_of(most[0], kernels),
        kernels=kernels,
    )


def live_form(model: DeepseekV3) -> Form:
    return form_of(model.config, _live_tensors(model))


def gguf_form(path: Path) -> Form:
    with open_source(path) as source, read_gguf(path) as file:
        tensors = [Stored(t.name, t.kind.name, t.num_bytes) for t in file.tensors.values()]
        return form_of(source.config, tensors)


def folder_form(path: Path, dtype: str) -> Form:
    """A Hugging Face folder's, run in that dtype (bfloat16 or float32)."""
    size = 2 if dtype == "bfloat16" else 4
    with open_source(path) as source:
        entries = [e for e in source.entries.values() if not e.name.endswith("_scale_inv")]
        tensors = [Stored(e.name, dtype, size * _numel(e.shape)) for e in entries]
        return form_of(source.config, tensors)


def prefill_work(config: ModelConfig, form: Form, num_tokens: int, step_tokens: int) -> Work:
    """A prompt's, in steps that each read the weights again; the head meets its last token."""
    sizes = [step_tokens] * (num_tokens // step_tokens)
    sizes += [rest] if (rest := num_tokens % step_tokens) else []
    experts = [distinct_experts(config, size) for size in sizes]
    num_bytes = sum(form.step_bytes(num) for num in experts)
    flops = prompt_flops(config, num_tokens)
    return Work(num_bytes, flops, form.operands, num_tokens, sum(experts) / len(experts))


def decode_work(
    config: ModelConfig,
    form: Form,
    num_streams: int,
    num_cached: float,
    cache: tuple[CacheDtype, str],
    experts: float | None = None,
) -> Work:
    """A step's, of streams that have `num_cached` tokens together, in a cache of that kind in a
    model of that dtype. `experts` that a layer reads: as counted, or as chance has it.
    """
    kind, dtype = cache
    each = bytes_per_token(config, kind, getattr(torch, dtype))
    experts = distinct_experts(config, num_streams) if experts is None else experts
    num_bytes = form.step_bytes(experts) + config.num_hidden_layers * each * num_cached
    context = num_cached / num_streams
    flops = num_streams * forward_flops_per_token(config, context, use_absorbed=True)
    return Work(num_bytes, flops, form.operands, num_streams, experts)


def _live_tensors(model: DeepseekV3) -> Iterable[Stored]:
    """All parameters, and buffers of parts that hold weights in them."""
    parts = {name: module for name, module in model.named_modules() if isinstance(module, Served)}
    buffers = (pair for pair in model.named_buffers() if pair[0].rpartition(".")[0] in parts)
    for name, tensor in (*model.named_parameters(), *buffers):
        part = parts.get(name.rpartition(".")[0])
        storage = part.storage()[0] if part else str(tensor.dtype).removeprefix("torch.")
        kernels = part.kernels.name if part else ""
        yield Stored(name, storage, tensor.numel() * tensor.element_size(), kernels)


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _numel(shape: tuple[int, ...]) -> int:
    num = 1
    for size in shape:
        num *= size
    return num
