"""What a conversion will write: every tensor of every file, its dtype, its part of the source."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.weights.folder import SINGLE
from rorqual.weights.gguf.mixes import MIXES, mix_of
from rorqual.weights.huggingface_writer import MAX_SHARD_BYTES, cut_shards, shard_name
from rorqual.weights.names import EMBEDDING, HEAD, Kind, StoredTensor, layer_of
from rorqual.weights.safetensors_file import DTYPES, Layout, lay_out
from rorqual.weights.shards.names import Part, check_world, part_of, scale_part, shard_file
from rorqual.weights.shards.names import shard_name as rank_name
from rorqual.weights.source import TensorSource

E4M3 = "F8_E4M3"
BLOCK_PAIR = (128, 128)
ScaleFormat = Literal["float32", "ue8m0"]
TARGETS = (
    "bf16, fp8, float32, hf, shards:N, shards:N:bf16, or gguf:MIX with MIX one of "
    + ", ".join(MIXES)
)


@dataclass(frozen=True)
class Target:
    """What `--to` asks for. `dtype` None keeps each tensor's own."""

    kind: Literal["huggingface", "shards", "gguf"]
    dtype: Literal["bf16", "fp8", "float32"] | None = None
    world: int = 1
    mix: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """`bf16`, `fp8`, `float32`, `hf`, `shards:N`, `shards:N:bf16`, `gguf:MIX`; UsageError."""
        kind, _, rest = text.partition(":")
        if kind in ("bf16", "fp8", "float32") and not rest:
            return cls("huggingface", kind)  # type: ignore[arg-type]
        if kind == "hf" and not rest:
            return cls("huggingface")
        if kind == "gguf" and rest:
            return cls("gguf", mix=mix_of(rest).name)
        world, _, dtype = rest.partition(":")
        is_world = world.isdecimal() and 0 < int(world) < 10**6
        if kind == "shards" and is_world and dtype in ("", "bf16", "fp8", "float32"):
            return cls("shards", dtype or None, int(world))  # type: ignore[arg-type]
        raise UsageError(f"--to {text!r} is no target", expected=TARGETS)

    @property
    def text(self) -> str:
        """As `--to` has it."""
        if self.kind == "gguf":
            return f"gguf:{self.mix}"
        if self.kind == "shards":
            return f"shards:{self.world}" + (f":{self.dtype}" if self.dtype else "")
        return self.dtype or "hf"


def _no_scales(scale_format: str, target: str) -> UsageError:
    return UsageError(
        "only FP8 has scales",
        found=f"--scale-format {scale_format} with {target}",
        expected="--to fp8, shards:N:fp8, or hf and shards:N of an FP8 checkpoint",
        fix="leave --scale-format out",
    )


@dataclass(frozen=True)
class Options:
    """How to convert. `keep_mtp` None: kept, but not in rank shards, as the demo has them."""

    target: Target
    keep_mtp: bool | None = None
    scale_format: ScaleFormat | None = None  # None: as the source has them, else float32
    max_shard_bytes: float | None = None  # None: 5 GB, and GGUF in one file
    imatrix: Path | None = None  # importance of columns for GGUF, see gguf/importance.py

    def __post_init__(self) -> None:
        if self.imatrix is not None and self.target.kind != "gguf":
            raise UsageError(
                "an importance matrix is for GGUF only",
                found=f"--imatrix {self.imatrix}",
                expected="--to gguf:MIX",
            )
        if self.max_shard_bytes is not None and self.target.kind == "shards":
            raise UsageError(
                "a rank has one file, whatever its size",
                found=f"--max-file-gb {self.max_shard_bytes / 1e9:g}",
                fix="leave it out, or ask for more ranks: --to shards:N",
            )
        if self.scale_format is not None and (
            self.target.kind == "gguf" or self.target.dtype in ("bf16", "float32")
        ):
            raise _no_scales(self.scale_format, f"--to {self.target.text}")

    def check_scales(self, dtypes: Iterable[str]) -> None:
        """UsageError for a format of scales where nothing that is written has any."""
        if self.scale_format is not None and E4M3 not in dtypes:
            raise _no_scales(self.scale_format, f"--to {self.target.text}, of a source without FP8")

    @property
    def shard_bytes(self) -> float:
        return MAX_SHARD_BYTES if self.max_shard_bytes is None else self.max_shard_bytes

    @property
    def is_mtp_kept(self) -> bool:
        return self.target.kind != "shards" if self.keep_mtp is None else self.keep_mtp


@dataclass(frozen=True)
class Output:
    """A tensor to be written. A "scale" is written with the weight before it in the list."""

    name: str  # in the file
    tensor: StoredTensor  # the Hugging Face tensor it is made of (its weight, if a scale)
    dtype: str
    shape: tuple[int, ...]
    part: Part
    kind: Kind

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PlannedFile:
    name: str
    outputs: tuple[Output, ...]

    def layout(self) -> Layout:
        return lay_out((output.name, output.dtype, output.shape) for output in self.outputs)

    @property
    def num_bytes(self) -> int:
        """Of the tensors; the header comes on top."""
        return sum(output.num_bytes for output in self.outputs)

    def weights(self) -> Iterable[tuple[Output, Output | None]]:
        """Each tensor with its scale."""
        scales = {output.tensor.name: output for output in self.outputs if output.kind == "scale"}
        for output in self.outputs:
            if output.kind != "scale":
                is_fp8 = output.dtype == E4M3
                yield output, scales[output.tensor.name] if is_fp8 else None


def plan_files(
    source: TensorSource, tensors: list[StoredTensor], config: ModelConfig, options: Options
) -> list[PlannedFile]:
    """The files of a conversion to safetensors. UsageError where the target cannot hold it."""
    kept = [t for t in tensors if options.is_mtp_kept or not _is_mtp(t.name, config)]
    if options.target.kind == "shards":
        return _plan_ranks(source, kept, config, options)
    if config.tie_word_embeddings and not source.is_huggingface:
        kept = [t for t in kept if t.name != HEAD]  # other formats repeat it, ours does not
    outputs = []
    for tensor in kept:
        outputs += _with_scale(source, tensor, Part((0, tensor.shape[0])), options)
    shards = cut_shards(outputs, lambda output: output.num_bytes, options.shard_bytes)
    if len(shards) == 1:
        return [PlannedFile(SINGLE, tuple(shards[0]))]
    return [
        PlannedFile(shard_name(number, len(shards)), tuple(shard))
        for number, shard in enumerate(shards, 1)
    ]


def _plan_ranks(
    source: TensorSource, tensors: list[StoredTensor], config: ModelConfig, options: Options
) -> list[PlannedFile]:
    world = options.target.world
    is_fp8 = any(stored_dtype(source, tensor, options) == E4M3 for tensor in tensors)
    if is_fp8 and options.target.dtype is None and _block(source) != BLOCK_PAIR:
        raise UsageError(
            "the demo knows FP8 blocks of 128x128 only",
            where=source.path,
            found=f"weight_block_size {list(_block(source))}",
            fix=f"quantise anew, or go to bfloat16: --to shards:{world}:fp8 or shards:{world}:bf16",
        )
    check_world(config, world, is_fp8=is_fp8)
    names = {tensor.name: tensor for tensor in tensors}
    if HEAD not in names:  # the demo always has a head of its own
        names[HEAD] = names[EMBEDDING]
    files = []
    for rank in range(world):
        outputs = []
        for name, tensor in names.items():
            part = part_of(name, tensor.shape, rank, world, config.n_routed_experts)
            if part is not None:
                outputs += _with_scale(source, tensor, part, options, as_rank=name)
        files.append(PlannedFile(shard_file(rank, world), tuple(outputs)))
    return files


def _with_scale(
    source: TensorSource,
    tensor: StoredTensor,
    part: Part,
    options: Options,
    as_rank: str | None = None,
) -> list[Output]:
    """The part of a tensor as it will be stored, and its scale if that is FP8."""
    name = as_rank or tensor.name
    dtype = stored_dtype(source, tensor, options)
    shape = _shape(tensor.shape, part)
    file_name = rank_name(name) if as_rank else name
    outputs = [Output(file_name, tensor, dtype, shape, part, tensor.kind)]
    if dtype == E4M3:
        scale_name = rank_name(name + "_scale_inv") if as_rank else tensor.scale_name
        block = _block(source) if is_copied(source, tensor, options) else BLOCK_PAIR
        blocks = scale_part(part, block)
        scale_shape = _shape(tensor.scale_shape(block), blocks)
        scale_dtype = _scale_dtype(source, tensor, options)
        outputs.append(Output(scale_name, tensor, scale_dtype, scale_shape, blocks, "scale"))
    return outputs


def _shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    rest = shape[1:]
    if part.columns is not None:
        rest = (part.columns[1] - part.columns[0],)
    return (part.rows[1] - part.rows[0], *rest)


def stored_dtype(source: TensorSource, tensor: StoredTensor, options: Options) -> str:
    """safetensors' name of what a tensor becomes: FP8 is for `self_attn` and `mlp`."""
    wanted, found = options.target.dtype, source.entries[tensor.name].dtype
    if tensor.kind == "bias" or wanted == "float32":
        return "F32"
    if wanted is None:
        return found if source.is_verbatim else "BF16"
    return E4M3 if wanted == "fp8" and tensor.kind == "projection" else "BF16"


def is_copied(source: TensorSource, tensor: StoredTensor, options: Options) -> bool:
    """FP8 blocks that are carried over as they are (scales may still change their form)."""
    is_fp8 = source.entries[tensor.name].dtype == E4M3
    keeps_blocks = options.target.dtype is None or _block(source) == BLOCK_PAIR
    return is_fp8 and keeps_blocks and stored_dtype(source, tensor, options) == E4M3


def _scale_dtype(source: TensorSource, tensor: StoredTensor, options: Options) -> str:
    if options.scale_format is None and is_copied(source, tensor, options):
        return source.entries[tensor.scale_name].dtype
    return "F32"  # powers of two too, as V3.1 is published


def _block(source: TensorSource) -> tuple[int, int]:
    return BLOCK_PAIR if source.quantisation is None else source.quantisation.block


def _is_mtp(name: str, config: ModelConfig) -> bool:
    layer = layer_of(name)
    return layer is not None and layer >= config.num_hidden_layers
