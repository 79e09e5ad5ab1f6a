"""What is to run, and on which kind of engine: in which form weights and latents lie in memory.

Two engines are planned for. "rorqual" is ours: one device; weights run as `--dtype` says; the MTP
layer, where the checkpoint has one, is loaded; latents are kept in blocks. "any" is an engine that
runs what is stored, divides a model among devices and loads no MTP layer unless it drafts, as vLLM,
SGLang and llama.cpp come near to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast, get_args

import torch

from rorqual.engine import EngineOptions
from rorqual.engine.cache_formats import CacheDtype
from rorqual.engine.paged_cache import block_bytes
from rorqual.errors import UsageError, listing
from rorqual.model import ModelConfig
from rorqual.plan.hardware import Hardware
from rorqual.plan.sizes import Runs
from rorqual.weights.forms import FORMS
from rorqual.weights.model_folder import DTYPES, auto_dtype, has_kernels

ENGINES = ("rorqual", "any")
KV_FORMATS = ("auto", "float32", "bf16", "fp8", "q8", "q8_0", "q4_0")
OUR_KV_FORMATS = get_args(CacheDtype)


@dataclass(frozen=True)
class Wish:
    """The model, what its files hold, and the load: `batch` streams of `context` tokens.

    `dtype` is how weights run (our engine's `--dtype`), `num_drafts` what is drafted by MTP.
    """

    config: ModelConfig
    weights: str
    kv: str = "auto"
    context: int = 1
    batch: int = 1
    engine: str = "any"
    dtype: str = "auto"
    num_drafts: int = 0

    @property
    def is_ours(self) -> bool:
        return self.engine == "rorqual"

    @property
    def runs_as(self) -> str | Runs:
        """The format of weights in memory."""
        if not self.is_ours or self.dtype == "stored":
            return self.weights
        if self.dtype in FORMS:
            return Runs(self.weights, self.dtype)
        dtype = self.dtype
        if dtype == "auto":
            dtype = auto_dtype(self.config, has_kernels=False)
        return "bf16" if dtype == "bfloat16" else dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a hidden state: in our engine float32 where weights run as they are stored."""
        is_float32 = self.runs_as == "float32" or (self.is_ours and self.dtype in FORMS)
        return 4 if is_float32 else 2

    def step_tokens(self, hardware: Hardware) -> int:
        """Tokens of prefill in one step."""
        return EngineOptions.max_step_tokens if self.is_ours else hardware.step_tokens

    @property
    def num_depths(self) -> int:
        """MTP modules that draft; more drafts than these use the last one again."""
        return min(self.num_drafts, self.config.num_nextn_predict_layers)

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP layer is in memory."""
        return self.num_depths > 0 or (self.is_ours and self.config.num_nextn_predict_layers > 0)

    @property
    def cache_format(self) -> str:
        if self.kv != "auto":
            return self.kv
        is_stored = self.is_ours and self.dtype in FORMS
        return "float32" if self.itemsize == 4 and not is_stored else "bf16"

    @property
    def cache_layers(self) -> int:
        return self.config.num_hidden_layers + self.num_depths

    @property
    def cache_bytes(self) -> float:
        """All streams' latents; ours in whole blocks, with one to spare."""
        if not self.is_ours:
            return self.batch * self.context * self.cache_bytes_per_token
        dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16
        kind = cast(CacheDtype, self.cache_format)
        size = block_bytes(self.config, EngineOptions.block_tokens, kind, dtype, self.num_depths)
        return (self.batch * -(-self.context // EngineOptions.block_tokens) + 1) * size

    @property
    def cache_bytes_per_token(self) -> float:
        return self.cache_layers * layer_cache_bytes(self.config, self.cache_format)


def cache_bytes_by_format(wish: Wish) -> dict[str, float]:
    """Of a token in all layers, in each format of the engine."""
    formats = [
        kv for kv in KV_FORMATS if kv != "auto" and (not wish.is_ours or kv in OUR_KV_FORMATS)
    ]
    return {kv: wish.cache_layers * layer_cache_bytes(wish.config, kv) for kv in formats}


def layer_cache_bytes(config: ModelConfig, kv: str) -> float:
    """Bytes a token leaves in one layer's cache.

    fp8 and q8 are our engine's (the rotary key in bfloat16; a float32 scale a token, a float16 one
    for 32 values); q8_0 and q4_0 are llama.cpp's blocks of 32 over all 576 values.
    """
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    by_format = {
        "float32": 4 * (rank + rope),
        "bf16": 2 * (rank + rope),
        "fp8": rank + 4 + 2 * rope,
        "q8": rank + 2 * -(-rank // 32) + 2 * rope,
        "q8_0": (rank + rope) * 34 / 32,
        "q4_0": (rank + rope) * 18 / 32,
    }
    return by_format[kv]


def can_run_stored(hardware: Hardware) -> bool:
    """Whether our engine can: `weights.load` refuses other devices than a CPU."""
    return hardware.is_cpu


def checked(wish: Wish, hardware: Hardware) -> Wish:
    """The wish with its names in our spelling; UsageError for what the engine has not."""
    if wish.engine not in ENGINES:
        raise UsageError("unknown engine", found=wish.engine, expected=listing(ENGINES))
    _check_kv(wish)
    if wish.dtype not in DTYPES:
        raise UsageError("unknown dtype", found=wish.dtype, expected=listing(DTYPES))
    if not wish.is_ours and wish.dtype != "auto":
        raise UsageError(
            "a dtype is of our engine: others run what is stored",
            found=f"dtype {wish.dtype} with engine {wish.engine}",
            fix="--engine rorqual, or say with --weights in what form the files are",
        )
    if wish.is_ours and hardware.num_devices > 1:
        raise UsageError(
            "our engine runs on one device",
            found=f"{hardware.num_devices} devices",
            fix="--engine any plans for one that divides a model among devices",
        )
    if wish.is_ours and not hardware.runs_ours:
        raise UsageError(
            "our engine runs on CPUs, and where torch has CUDA or ROCm",
            found=hardware.label,
            fix="--engine any plans for one that has kernels for it, such as llama.cpp",
        )
    if wish.dtype in FORMS and not can_run_stored(hardware):
        raise UsageError(
            "our engine runs weights as they are stored on a CPU only",
            found=f"dtype {wish.dtype} on {hardware.label}",
            fix="--dtype bfloat16, or --engine any plans for one that runs what is stored",
        )
    is_auto = wish.is_ours and wish.dtype == "auto"
    if is_auto and hardware.is_cpu and has_kernels(torch.device("cpu")):
        wish = replace(wish, dtype=auto_dtype(wish.config, has_kernels=True))
    if wish.num_drafts < 0:
        raise UsageError("drafts are none or some", found=wish.num_drafts)
    if wish.num_drafts and not wish.config.num_nextn_predict_layers:
        raise UsageError("drafts need an MTP layer, and this model has none", fix="leave them out")
    if wish.context < 1 or wish.batch < 1:
        found = f"{wish.context} and {wish.batch}"
        raise UsageError("context and batch are at least 1", found=found)
    if wish.context > wish.config.max_position_embeddings:
        raise UsageError(
            "the context is longer than the model's positions",
            found=f"{wish.context:,}",
            expected=f"at most {wish.config.max_position_embeddings:,}",
        )
    return wish


def _check_kv(wish: Wish) -> None:
    if wish.kv not in KV_FORMATS:
        expected = listing(KV_FORMATS)
        raise UsageError(f"unknown format of the cache {wish.kv!r}", expected=expected)
    if wish.is_ours and wish.kv not in OUR_KV_FORMATS:
        raise UsageError(
            f"our engine has no cache in {wish.kv}",
            expected=listing(OUR_KV_FORMATS),
            fix="--engine any plans for one that has",
        )
