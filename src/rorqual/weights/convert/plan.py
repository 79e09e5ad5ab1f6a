"""What a conversion will write: every tensor of every file, its dtype, its part of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.weights.folder import SINGLE, shard_name
from rorqual.weights.fp8 import BLOCK_PAIR, E4M3, FORMAT_OF, dtype_in, scale_name
from rorqual.weights.gguf.mixes import MIXES, mix_of
from rorqual.weights.names import EMBEDDING, HEAD, StoredTensor, layer_of
from rorqual.weights.planned import Layout, PlannedTensor, Region, cut_files, planned_scale
from rorqual.weights.safetensors_file import lay_out
from rorqual.weights.shards.names import check_world, region_of, scale_region, shard_file
from rorqual.weights.shards.names import shard_name as rank_name
from rorqual.weights.source import TensorSource, block_of

MAX_SHARD_BYTES = 5_000_000_000
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
    is_ema: bool = False  # the average of the parameters that a training run keeps

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
class PlannedFile:
    name: str
    tensors: tuple[PlannedTensor, ...]

    def layout(self) -> Layout:
        return lay_out(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Of the tensors; the header comes on top."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def weights(self) -> Iterator[tuple[PlannedTensor, PlannedTensor | None]]:
        """Each tensor with its scale."""
        scales = {tensor.source.name: tensor for tensor in self.tensors if tensor.role == "scale"}
        for tensor in self.tensors:
            if tensor.role != "scale":
                yield tensor, scales[tensor.source.name] if tensor.dtype == E4M3 else None


def index_of(files: Sequence[PlannedFile]) -> dict[str, Any]:
    """`model.safetensors.index.json`."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(file.num_bytes for file in files)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def plan_files(
    source: TensorSource, tensors: list[StoredTensor], config: ModelConfig, options: Options
) -> list[PlannedFile]:
    """The files of a conversion to safetensors. UsageError where the target cannot hold it."""
    kept = [t for t in tensors if options.is_mtp_kept or not _is_mtp(t.name, config)]
    if options.target.kind == "shards":
        return _plan_ranks(source, kept, config, options)
    if config.tie_word_embeddings and not source.is_huggingface:
        kept = [t for t in kept if t.name != HEAD]  # other formats repeat it, ours does not
    planned = []
    for tensor in kept:
        planned += _with_scale(source, tensor, options)
    shards = cut_files(planned, options.shard_bytes)
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
    if is_fp8 and options.target.dtype is None and block_of(source) != BLOCK_PAIR:
        raise UsageError(
            "the demo knows FP8 blocks of 128x128 only",
            where=source.path,
            found=f"weight_block_size {list(block_of(source))}",
            fix=f"quantise anew, or go to bfloat16: --to shards:{world}:fp8 or shards:{world}:bf16",
        )
    check_world(config, world, is_fp8=is_fp8)
    names = {tensor.name: tensor for tensor in tensors}
    if HEAD not in names:  # the demo always has a head of its own
        names[HEAD] = names[EMBEDDING]
    files = []
    for rank in range(world):
        planned = []
        for name, tensor in names.items():
            region = region_of(name, tensor.shape, rank, world, config.n_routed_experts)
            if region is not None:
                whole = _with_scale(source, tensor, options)
                planned += [_of_rank(one, name, region) for one in whole]
        files.append(PlannedFile(shard_file(rank, world), tuple(planned)))
    return files


def _with_scale(
    source: TensorSource, tensor: StoredTensor, options: Options
) -> list[PlannedTensor]:
    """A tensor as it will be stored, and its scale if that is FP8."""
    dtype = stored_dtype(source, tensor, options)
    planned = [PlannedTensor(tensor.name, dtype, tensor.shape, (tensor,))]
    if dtype == E4M3:
        block = block_of(source) if is_copied(source, tensor, options) else BLOCK_PAIR
        planned.append(planned_scale(tensor, _scale_dtype(source, tensor, options), block))
    return planned


def _of_rank(whole: PlannedTensor, name: str, region: Region) -> PlannedTensor:
    """What a rank has of a tensor or of its scales, under the demo's name for `name`."""
    if whole.role == "scale":
        name, region = scale_name(name), scale_region(region)
    rest = whole.shape[1:]
    if region.columns is not None:
        rest = (region.columns[1] - region.columns[0],)
    shape = (region.rows[1] - region.rows[0], *rest)
    return replace(whole, name=rank_name(name), shape=shape, region=region)


def stored_dtype(source: TensorSource, tensor: StoredTensor, options: Options) -> str:
    """safetensors' name of what a tensor becomes."""
    wanted = options.target.dtype
    if wanted is not None or tensor.kind == "bias":
        return dtype_in(FORMAT_OF[wanted or "bf16"], tensor.kind)
    return source.entries[tensor.name].dtype if source.is_verbatim else "BF16"


def is_copied(source: TensorSource, tensor: StoredTensor, options: Options) -> bool:
    """FP8 blocks that are carried over as they are (scales may still change their form)."""
    is_fp8 = source.entries[tensor.name].dtype == E4M3
    keeps_blocks = options.target.dtype is None or block_of(source) == BLOCK_PAIR
    return is_fp8 and keeps_blocks and stored_dtype(source, tensor, options) == E4M3


def _scale_dtype(source: TensorSource, tensor: StoredTensor, options: Options) -> str:
    if options.scale_format is None and is_copied(source, tensor, options):
        return source.entries[tensor.scale_name].dtype
    return "F32"  # powers of two too, as V3.1 is published


def _is_mtp(name: str, config: ModelConfig) -> bool:
    layer = layer_of(name)
    return layer is not None and layer >= config.num_hidden_layers
