"""kv_b_proj in halves. Oracle: the matrix, decoded whole and then cut by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_gguf import WIDE
from test_gguf import stored as saved
from torch import Tensor

from rorqual.model.stored import StoredHalves
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.ops.kernels import FP8
from rorqual.ops.quantise import decode_blocks, encode_blocks
from rorqual.weights import load
from rorqual.weights.latent_halves import Half, split_latent_up
from rorqual.weights.source import StoredBytes
from small import lively

HEADS, LATENT = 3, 256


def weight(widths: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(HEADS * sum(widths), LATENT, generator=generator)


def cut_by_hand(whole: Tensor, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    keys, values = [], []
    for head in range(HEADS):
        first = head * sum(widths)
        keys.append(whole[first : first + widths[0]].t())
        values.append(whole[first + widths[0] : first + sum(widths)])
    return torch.stack(keys), torch.stack(values)


@pytest.mark.parametrize(
    ("kind", "kind_of_keys"),
    [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "F32"), ("Q4_K", "F32")],
)
@pytest.mark.parametrize("widths", [(32, 48), (7, 5)])
def test_no_value_changes(kind: str, kind_of_keys: str, widths: tuple[int, int]) -> None:
    raw = encode_blocks(weight(widths), kind)
    found = split_latent_up(StoredBytes(kind, raw), widths)
    assert [half.kind for half in found] == [kind_of_keys, kind]
    for half, expected in zip(found, cut_by_hand(decode_blocks(raw, kind), widths), strict=True):
        assert half.shape == expected.shape
        assert half.scales_HXY is None
        assert torch.equal(
            decode_blocks(half.codes_HOB.flatten(0, 1), half.kind), expected.flatten(0, 1)
        )


# Blocks that end between halves, within them, between heads; a last one that is not full.
@pytest.mark.parametrize("widths", [(128, 128), (64, 128), (32, 48), (7, 5)])
@pytest.mark.parametrize("size", [128, 48])
def test_fp8_keeps_its_codes_and_scales(widths: tuple[int, int], size: int) -> None:
    codes, scales = quantise_blocks(weight(widths), size)
    stored = StoredBytes(FP8, codes.view(torch.uint8), scales, (size, size))
    found = split_latent_up(stored, widths)
    whole = dequantise_blocks(codes, scales, block=(size, size))
    for half, expected in zip(found, cut_by_hand(whole, widths), strict=True):
        assert half.kind == FP8
        assert half.shape == expected.shape
        assert torch.equal(decoded(half), expected)


def decoded(half: Half) -> Tensor:
    assert half.scales_HXY is not None
    codes = half.codes_HOB.view(torch.float8_e4m3fn)
    return dequantise_blocks(codes, half.scales_HXY, block=half.block)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_a_folders_kv_b_is_in_halves(form: str, tmp_path: Path) -> None:
    path = saved(lively(WIDE), tmp_path / "hf", form)
    whole, found = load(path, "float32"), load(path, "stored", kernels="decoded")
    for layer_id in ("0", "1"):
        original = whole.model.layers[layer_id].self_attn.kv_b_proj
        halves = found.model.layers[layer_id].self_attn.kv_b_proj
        assert isinstance(halves, StoredHalves)
        keys, values = original._by_head()
        for head in range(WIDE.num_attention_heads):
            assert torch.equal(halves.keys.dense(head), keys[head].t())
            assert torch.equal(halves.values.dense(head), values[head])
