"""How the latents of one layer are stored: as they are, in FP8, or in eight-bit integers.

The two small formats keep the rotary key in bfloat16, since rounding it changes every score, and
give the latent a scale: FP8 (e4m3) one a token, as the report's activations have it (§3.3.2,
1x128 tiles would be the same at a rank of 128), q8 one for 32 values, as GGUF's Q8_0.
"""

# P blocks, Q tokens a block, M tokens, C kv_lora_rank, R rotary width, L = C + R, G groups of 32

from __future__ import annotations

from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import UsageError
from rorqual.model import ModelConfig

CacheDtype = Literal["auto", "float32", "bf16", "fp8", "q8"]
PLAIN_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
E4M3_MAX = 448.0
Q8_GROUP = 32


class Store(Protocol):
    """One layer's latents. `planes` are tensors (P, Q, ..) that hold them together."""

    planes: list[Tensor]

    def encode(self, latent_ML: Tensor) -> list[Tensor]:
        """What is written of these latents into each plane, (M, ..)."""
        ...

    def decode(self, planes: list[Tensor]) -> Tensor:
        """(.., L) from what was read of each plane, (.., ..)."""
        ...


class PlainStore:
    """The latents in a dtype of their own."""

    def __init__(
        self, config: ModelConfig, shape: tuple[int, int], stored: torch.dtype, like: Tensor
    ) -> None:
        self._dtype = like.dtype
        self.planes = [_zeros((*shape, config.latent_dim), stored, like.device)]

    def encode(self, latent_ML: Tensor) -> list[Tensor]:
        return [latent_ML.to(self.planes[0].dtype)]

    def decode(self, planes: list[Tensor]) -> Tensor:
        return planes[0].to(self._dtype)


class Fp8Store:
    """e4m3 with a float32 scale a token; the rotary key in bfloat16."""

    def __init__(self, config: ModelConfig, shape: tuple[int, int], like: Tensor) -> None:
        self._rank, self._dtype = config.kv_lora_rank, like.dtype
        self.planes = [
            _zeros((*shape, config.kv_lora_rank), torch.float8_e4m3fn, like.device),
            _zeros((*shape, 1), torch.float32, like.device),
            _zeros((*shape, config.qk_rope_head_dim), torch.bfloat16, like.device),
        ]

    def encode(self, latent_ML: Tensor) -> list[Tensor]:
        c_MC, rope_MR = latent_ML[:, : self._rank].float(), latent_ML[:, self._rank :]
        scale_M1 = (c_MC.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
        # torch 2.11 turns what exceeds 448 into NaN where 2.13 saturates: clamp before the cast.
        scaled_MC = (c_MC / scale_M1).clamp(-E4M3_MAX, E4M3_MAX)
        return [scaled_MC.to(torch.float8_e4m3fn), scale_M1, rope_MR.to(torch.bfloat16)]

    def decode(self, planes: list[Tensor]) -> Tensor:
        c, scale, rope = planes
        latent = (c.to(torch.float32) * scale).to(self._dtype)
        return torch.cat([latent, rope.to(self._dtype)], dim=-1)


class Q8Store:
    """int8 with a bfloat16 scale for 32 values; the rotary key in bfloat16."""

    def __init__(self, config: ModelConfig, shape: tuple[int, int], like: Tensor) -> None:
        self._rank, self._dtype = config.kv_lora_rank, like.dtype
        self._num_groups = -(-config.kv_lora_rank // Q8_GROUP)
        self.planes = [
            _zeros((*shape, config.kv_lora_rank), torch.int8, like.device),
            _zeros((*shape, self._num_groups), torch.bfloat16, like.device),
            _zeros((*shape, config.qk_rope_head_dim), torch.bfloat16, like.device),
        ]

    def encode(self, latent_ML: Tensor) -> list[Tensor]:
        c_MC, rope_MR = latent_ML[:, : self._rank].float(), latent_ML[:, self._rank :]
        padded = F.pad(c_MC, (0, self._num_groups * Q8_GROUP - self._rank))
        peak_MG = padded.unflatten(-1, (-1, Q8_GROUP)).abs().amax(-1)
        # Divided by the rounded scale, since that is what decoding multiplies with.
        scale_MG = (peak_MG / 127).clamp_min(1e-30).to(torch.bfloat16)
        scaled_MC = (c_MC / self._wide(scale_MG)).round().clamp(-127, 127)
        return [scaled_MC.to(torch.int8), scale_MG, rope_MR.to(torch.bfloat16)]

    def decode(self, planes: list[Tensor]) -> Tensor:
        c, scale, rope = planes
        latent = (c.float() * self._wide(scale)).to(self._dtype)
        return torch.cat([latent, rope.to(self._dtype)], dim=-1)

    def _wide(self, scale: Tensor) -> Tensor:
        return scale.float().repeat_interleave(Q8_GROUP, dim=-1)[..., : self._rank]


def store(config: ModelConfig, shape: tuple[int, int], kind: CacheDtype, like: Tensor) -> Store:
    """An empty store of `shape` = (blocks, tokens a block); it gives latents of `like`'s dtype."""
    if kind == "fp8":
        return Fp8Store(config, shape, like)
    if kind == "q8":
        return Q8Store(config, shape, like)
    return PlainStore(config, shape, PLAIN_DTYPES.get(kind, like.dtype), like)


def stored_as(kind: CacheDtype, dtype: torch.dtype) -> str:
    """What "auto" means with latents of this dtype; another kind is itself."""
    if kind != "auto":
        return kind
    names = {stored: name for name, stored in PLAIN_DTYPES.items()}
    return names.get(dtype, str(dtype))


def bytes_per_token(config: ModelConfig, kind: CacheDtype, dtype: torch.dtype) -> int:
    """Of one layer."""
    sample = store(config, (1, 1), kind, torch.empty(0, dtype=dtype))
    return sum(plane.numel() * plane.element_size() for plane in sample.planes)


def check_cache_dtype(kind: str) -> None:
    """UsageError for an unknown one."""
    if kind not in get_args(CacheDtype):
        raise UsageError(
            f"unknown dtype of the cache {kind!r}", expected=", ".join(get_args(CacheDtype))
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, never uninitialised memory: a masked slot counts 0 times its value, and 0 * NaN is
    NaN. On a CPU the system gives a page when it is first written, so unused room costs nothing.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
