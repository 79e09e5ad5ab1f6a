"""A model that runs from the bytes of its file: `load(path, "stored")`.

Matrices stay as they are stored, a stack of experts too; norms, routers and their bias are float32,
and so is what is computed. kv_b is in halves, as GGUF files store it (`latent_halves.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.balance import Balance
from rorqual.model.layers import Head, Linear
from rorqual.model.mla import LatentUp
from rorqual.model.moe import Experts
from rorqual.model.stored import (
    StoredEmbedding,
    StoredExperts,
    StoredHalves,
    StoredHead,
    StoredLinear,
    StoredStack,
)
from rorqual.ops.kernels import FP8
from rorqual.weights.audit import audit
from rorqual.weights.copies import say_it_differs
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.latent_halves import Half, split_latent_up
from rorqual.weights.names import StoredTensor
from rorqual.weights.progress import track
from rorqual.weights.safetensors_file import NAMES
from rorqual.weights.source import StoredBytes, TensorSource, block_of
from rorqual.weights.values import StoredRows, read_scale, read_values


def load_stored(source: TensorSource, device: torch.device) -> DeepseekV3:
    """The model in an opened checkpoint; see `weights.load` for the errors."""
    if device.type != "cpu":
        raise UsageError(
            "weights run as they are stored on the CPU only",
            found=device,
            fix="choose --dtype bfloat16, or --device cpu",
        )
    report = audit(source)
    report.raise_faults(source.path)
    with torch.device("meta"):
        model = DeepseekV3(report.config)
    reader = _Reader(source, report.config, model)
    with torch.no_grad():
        for tensor in track(report.tensors, "loading", source.num_bytes()):
            if tensor.kind != "copy":
                reader.take(tensor)
    reader.finish()
    for tensor in report.tensors:
        if tensor.kind == "copy":
            _check_copy(source, tensor, model)
    return model


def _check_copy(source: TensorSource, tensor: StoredTensor, model: DeepseekV3) -> None:
    """Its values by rows, and those of what is used in its place."""
    owner, _, _ = tensor.parameter.rpartition(".")
    part = model.get_submodule(owner)
    assert isinstance(part, StoredEmbedding | StoredLinear), "copies are of embedding and head"
    rows = StoredRows(source, tensor)
    if not all(
        torch.equal(rows.values(start, stop), part.stack.dense(0, start, stop))
        for start, stop in rows.chunks()
    ):
        say_it_differs(source, tensor)


class _Reader:
    """Puts each tensor where it belongs, and what holds bytes in the place of what held floats."""

    def __init__(self, source: TensorSource, config: ModelConfig, model: DeepseekV3) -> None:
        self.source, self.config, self.model = source, config, model
        self.experts: dict[str, dict[str, StoredStack]] = defaultdict(dict)

    def take(self, tensor: StoredTensor) -> None:
        owner, _, _ = tensor.parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        if isinstance(module, Experts):
            self._take_expert(owner, tensor)
        elif isinstance(module, LatentUp):
            self._replace(owner, self._halves(module, tensor))
        elif isinstance(module, Linear | nn.Embedding):
            kinds: dict[type, Callable[[StoredStack], nn.Module]]
            kinds = {Head: StoredHead, nn.Embedding: StoredEmbedding}
            self._replace(owner, kinds.get(type(module), StoredLinear)(self._matrix(tensor)))
        else:
            self._dense(tensor.parameter, read_values(self.source, tensor).float())

    def finish(self) -> None:
        for owner, parts in self.experts.items():
            self._replace(owner, StoredExperts(parts["gate"], parts["up"], parts["down"]))
        for layer in self.model.sparse_layers():
            layer.balance = Balance(self.config.n_routed_experts)
        embedding = self.model.model.embed_tokens
        if self.config.tie_word_embeddings and isinstance(embedding, StoredEmbedding):
            self._replace("lm_head", StoredHead(embedding.stack))
        self.model.model.rotary.reset_buffers()
        for parameter in self.model.parameters():
            assert not parameter.is_meta, "the audit found every tensor"

    def _halves(self, module: LatentUp, tensor: StoredTensor) -> StoredHalves:
        keys, values = (_stack_of(half) for half in self._read_halves(module, tensor))
        return StoredHalves(keys, values)

    def _read_halves(self, module: LatentUp, tensor: StoredTensor) -> tuple[Half, Half]:
        source, block, widths = self.source, block_of(self.source), module.widths
        halves = source.stored_halves(tensor.name) if isinstance(source, GgufSource) else None
        if halves is None:
            stored = self._stored(tensor)
            scales = read_scale(source, tensor) if stored.kind == FP8 else None
            return split_latent_up(stored, scales, block, widths)
        heads, latent = module.num_heads, self.config.kv_lora_rank
        shapes = (heads, latent, widths[0]), (heads, widths[1], latent)
        keys, values = (
            Half(kind, shape, codes_RB.view(*shape[:2], -1), block)
            for (kind, codes_RB), shape in zip(halves, shapes, strict=True)
        )
        return keys, values

    def _take_expert(self, owner: str, tensor: StoredTensor) -> None:
        expert_id = tensor.index[0]
        assert isinstance(expert_id, int), "experts are stacked"
        part = tensor.name.rpartition("_proj.")[0].rpartition(".")[2]
        stored = self._stored(tensor)
        stacks = self.experts[owner]
        if part not in stacks:
            num = self.config.n_routed_experts
            stacks[part] = self._stack(stored, (num, tensor.shape[0], tensor.shape[1]))
        self._fill(stacks[part], expert_id, tensor, stored)

    def _matrix(self, tensor: StoredTensor) -> StoredStack:
        stored = self._stored(tensor)
        stack = self._stack(stored, (1, tensor.shape[0], tensor.shape[1]))
        self._fill(stack, 0, tensor, stored)
        return stack

    def _stack(self, stored: StoredBytes, shape: tuple[int, int, int]) -> StoredStack:
        return StoredStack(stored.kind, shape, stored.codes_RB.shape[1], block_of(self.source))

    def _fill(
        self, stack: StoredStack, index: int, tensor: StoredTensor, stored: StoredBytes
    ) -> None:
        assert stored.kind == stack.kind, f"{tensor.name} is of another kind than its neighbours"
        stack.codes_EOB[index].copy_(stored.codes_RB)
        if stack.scales_EXY is not None:
            stack.scales_EXY[index].copy_(read_scale(self.source, tensor))

    def _stored(self, tensor: StoredTensor) -> StoredBytes:
        if isinstance(self.source, GgufSource):
            return self.source.stored(tensor.name)
        # In memory of their own: pages of a mapped file would count beside the copies.
        values = self.source.read_rows(tensor.name, 0, tensor.shape[0])
        codes = values.contiguous().view(torch.uint8).view(values.shape[0], -1)
        return StoredBytes(NAMES[values.dtype], codes)

    def _replace(self, name: str, module: nn.Module) -> None:
        owner, _, key = name.rpartition(".")
        setattr(self.model.get_submodule(owner), key, module)

    def _dense(self, name: str, values: Tensor) -> None:
        owner, _, key = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if key in module._parameters:
            setattr(module, key, nn.Parameter(values.clone(), requires_grad=False))
        else:
            setattr(module, key, values.clone())


def _stack_of(half: Half) -> StoredStack:
    stack = StoredStack(half.kind, half.shape, half.codes_HOB.shape[2], half.block)
    stack.codes_EOB.copy_(half.codes_HOB)
    if stack.scales_EXY is not None and half.scales_HXY is not None:
        stack.scales_EXY.copy_(half.scales_HXY)
    return stack
