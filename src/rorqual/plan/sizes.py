"""Bytes of the weights in each format: on disk as files hold them, in memory as a model does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.ops.packed import TILE_ROWS
from rorqual.ops.quant_types import FLOAT_TYPES, QUANT_TYPES
from rorqual.weights.forms import FORMS, Form
from rorqual.weights.fp8 import FORMAT_OF
from rorqual.weights.gguf.format import DEFAULT_ALIGNMENT
from rorqual.weights.gguf.mixes import MIXES, gguf_bytes, planned_gguf
from rorqual.weights.names import EMBEDDING, HEAD
from rorqual.weights.planned import PlannedTensor, planned_tensors

GGUF = tuple(name for name in MIXES if name not in FLOAT_TYPES)
WEIGHT_FORMATS = (*FORMAT_OF, *GGUF)
EMBEDDINGS = (EMBEDDING, "token_embd.weight")
ROUTERS = ("mlp.gate.weight", "ffn_gate_inp.weight")
GIB = 1 << 30


@dataclass(frozen=True)
class Runs:
    """What our engine makes of files of a format: a form of `weights/forms.py`."""

    format: str
    form: str

    def __str__(self) -> str:
        return f"{self.format} as {self.form}"


def check_format(name: str) -> str:
    """The format's name in our spelling; UsageError for an unknown one.

    `gguf:MIX` too, as `convert --to` spells it: F32, F16 and BF16 are GGUF's own only so.
    """
    known = {known.lower(): known for known in WEIGHT_FORMATS} | {"bfloat16": "bf16"}
    known |= {f"gguf:{mix}".lower(): mix for mix in MIXES}
    if name.lower() not in known:
        floats = [f"gguf:{mix}" for mix in FLOAT_TYPES]
        raise UsageError(f"unknown format {name!r}", expected=", ".join((*WEIGHT_FORMATS, *floats)))
    return known[name.lower()]


@lru_cache(maxsize=64)
def disk_bytes(config: ModelConfig, format: str) -> int:
    """Bytes of the tensors in the files, as `convert` writes them; headers with the tokenizer and
    metadata, thousandths of it, are not counted.

    With the config's MTP layer: in safetensors with its copies of embedding and head, in GGUF
    without. GGUF's tensors are padded to their alignment.
    """
    if format in FORMAT_OF:
        tensors = planned_tensors(config, FORMAT_OF[format])
        return sum(tensor.num_bytes for tensor in tensors)
    sizes = [tensor.num_bytes for tensor in planned_gguf(config, format)]
    return sum(-(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT for size in sizes)


@lru_cache(maxsize=64)
def memory_bytes(config: ModelConfig, format: str | Runs, *, with_mtp: bool = False) -> int:
    """Bytes of the weights in memory: of the main model, or with the MTP layer, which has no
    embedding and no head of its own.
    """
    config = config if with_mtp else main_part(config)
    return sum(num_bytes for _, num_bytes in _tensors(config, format))


@lru_cache(maxsize=64)
def expert_bytes(config: ModelConfig, format: str | Runs) -> float:
    """Bytes of one routed expert of one layer, the mean over the layers; 0 if there is none."""
    num_layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    stacks = (size for name, size in _tensors(main_part(config), format) if _is_expert(name))
    return sum(stacks) / max(1, num_layers * config.n_routed_experts)


@lru_cache(maxsize=64)
def embedding_bytes(config: ModelConfig, format: str | Runs) -> int:
    """Bytes of the input embedding, of which a token reads one row; 0 where it is the head too."""
    if config.tie_word_embeddings:
        return 0
    return sum(size for name, size in _tensors(main_part(config), format) if name in EMBEDDINGS)


@lru_cache(maxsize=64)
def head_bytes(config: ModelConfig, format: str | Runs) -> int:
    """Bytes of the head's matrix, where it is the embedding too."""
    sizes = dict(_tensors(main_part(config), format))
    tied = EMBEDDINGS if config.tie_word_embeddings else ()
    return next(sizes[name] for name in (HEAD, "output.weight", *tied) if name in sizes)


def nearest_mix(config: ModelConfig, num_bytes: int) -> str:
    """The format of a GGUF file whose tensors take `num_bytes`, by the mix whose size is nearest.

    `config` is the file's: with the MTP layer if that is in it. A file in floating point is planned
    as the same in safetensors.
    """
    mix = min(MIXES, key=lambda mix: abs(gguf_bytes(config, mix) - num_bytes))
    return {"F32": "float32", "F16": "bf16", "BF16": "bf16"}.get(mix, mix)


def main_part(config: ModelConfig) -> ModelConfig:
    """The shape without its MTP layer."""
    return config.with_changes(num_nextn_predict_layers=0)


def _tensors(config: ModelConfig, format: str | Runs) -> Iterator[tuple[str, int]]:
    """(name in the files, bytes) of the tensors in memory, FP8 scales included."""
    if isinstance(format, Runs):
        form = FORMS[format.form]
        for tensor in _planned(config, format.format):
            yield tensor.name, _bytes_in(form, tensor, config)
        return
    for tensor in _planned(config, format):
        yield tensor.name, tensor.num_bytes


def _planned(config: ModelConfig, format: str) -> list[PlannedTensor]:
    if format in FORMAT_OF:
        return planned_tensors(config, FORMAT_OF[format], repeat_mtp_embedding=False)
    return planned_gguf(config, format)


def _bytes_in(form: Form, tensor: PlannedTensor, config: ModelConfig) -> int:
    """Norms and routers are float32, matrices whole tiles; an embedding stays as it is stored."""
    if tensor.role == "scale":
        return 0
    if len(tensor.shape) < 2 or tensor.name.endswith(ROUTERS):
        return 4 * math.prod(tensor.shape)
    if tensor.name in EMBEDDINGS and not config.tie_word_embeddings:
        return tensor.num_bytes
    *num, rows, columns = tensor.shape
    shapes = [(math.prod(num), rows, columns)]
    if tensor.name.endswith("kv_b_proj.weight"):
        heads, latent = config.num_attention_heads, columns
        shapes = [(heads, latent, config.qk_nope_head_dim), (heads, config.v_head_dim, latent)]
    return sum(_stack_bytes(form.kind_of(tensor.dtype, shape[2]), shape) for shape in shapes)


def _stack_bytes(kind: str, shape: tuple[int, int, int]) -> int:
    num, rows, columns = shape
    return num * -(-rows // TILE_ROWS) * TILE_ROWS * QUANT_TYPES[kind].num_bytes(columns)


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name or name.endswith("_exps.weight")
