"""MLA's attention in a training step, rotary turns included: no scores but those of a block of
queries exist, forward or backward. Queries, keys and values are read where the projections wrote
them; kept for the backward pass are these, the output and a number a row.
"""

# B sequences, T tokens, H heads, N qk_nope_head_dim, R rotary width, V v_head_dim, M = B * T rows

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.ops.attention import attention_plain
from rorqual.ops.native.training import Attend, address, rows, run


class Widths(NamedTuple):
    """Sequences, tokens of each, heads; widths of a head: keys' first part, rotary part, values."""

    num_sequences: int
    num_tokens: int
    num_heads: int
    nope: int
    turned: int
    value: int


def latent_attention(
    q: Tensor,
    kv: Tensor,
    rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    documents_BT: Tensor | None,
    widths: Widths,
    scale: float,
) -> Tensor:
    """Causal attention, (M, H V): q (M, H (N + R)) and rope (M, R), the last part of all heads'
    keys, are not yet rotated; kv (M, H (N + V)) holds each head's keys and values.

    cos and sin (B or 1, T, R / 2) float32. With documents, int64, a token sees its own alone.
    """
    return _attend(q, kv, rope, cos, sin, documents_BT, list(widths), scale)[0]


def latent_attention_plain(
    q: Tensor,
    kv: Tensor,
    rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    documents_BT: Tensor | None,
    widths: Widths,
    scale: float,
) -> Tensor:
    """The twin: all scores at once."""
    by_token = widths.num_sequences, widths.num_tokens
    q_BTHC = q.view(*by_token, widths.num_heads, -1)
    kv_BTHW = kv.view(*by_token, widths.num_heads, -1)
    k_BTHN, v_BTHV = kv_BTHW.split([widths.nope, widths.value], dim=-1)
    q_BTHN, q_BTHR = q_BTHC.split([widths.nope, widths.turned], dim=-1)
    angles = cos[:, :, None], sin[:, :, None]
    q_BTHC = torch.cat([q_BTHN, _turned(q_BTHR, *angles)], dim=-1)
    k_BTHR = _turned(rope.view(*by_token, 1, -1), *angles).expand(-1, -1, widths.num_heads, -1)
    k_BTHC = torch.cat([k_BTHN, k_BTHR], dim=-1)
    visible = None
    if documents_BT is not None:
        is_same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
        visible = is_same & torch.ones_like(is_same[0, 0]).tril()
    q_BHTC, k_BHTC, v_BHTV = (x.transpose(1, 2) for x in (q_BTHC, k_BTHC, v_BTHV))
    out_BHTV = attention_plain(q_BHTC, k_BHTC, v_BHTV, visible, scale)
    return out_BHTV.transpose(1, 2).reshape(len(q), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _struct(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, documents_BT: Tensor | None,
    widths: list[int], scale: float,
) -> Attend:  # fmt: skip
    _, num_tokens, num_heads, nope, turned, value = widths
    assert cos.is_contiguous(), "angles lie together"
    assert sin.is_contiguous(), "angles lie together"
    assert documents_BT is None or documents_BT.is_contiguous(), "so do documents"
    return Attend(
        q=rows(q), kv=rows(kv), cos=cos.data_ptr(), sin=sin.data_ptr(),
        documents=address(documents_BT), num_tokens=num_tokens, num_heads=num_heads, nope=nope,
        turned=turned, value=value, angles=cos[0].numel() if len(cos) > 1 else 0, scale=scale,
    )  # fmt: skip


@torch.library.custom_op("rorqual::train_attention", mutates_args=())
def _attend(
    q: Tensor, kv: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, documents_BT: Tensor | None,
    widths: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, logarithm of the sum of each row of each head)."""
    num_sequences, num_tokens, num_heads, _, _, value = widths
    out = q.new_empty(q.shape[0], num_heads * value)
    lse_BHT = q.new_empty(num_sequences, num_heads, num_tokens, dtype=torch.float32)
    arguments = _struct(q, kv, cos, sin, documents_BT, widths, scale)
    arguments.rope, arguments.out, arguments.lse = rows(rope), rows(out), lse_BHT.data_ptr()
    run("attend", arguments, num_sequences * num_heads)
    return out, lse_BHT


@_attend.register_fake
def _(
    q: Tensor, kv: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, documents_BT: Tensor | None,
    widths: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_sequences, num_tokens, num_heads, _, _, value = widths
    lse_BHT = q.new_empty(num_sequences, num_heads, num_tokens, dtype=torch.float32)
    return q.new_empty(q.shape[0], num_heads * value), lse_BHT


@torch.library.custom_op("rorqual::train_attention_grad", mutates_args=())
def _grad(
    dout: Tensor, kept: list[Tensor], documents_BT: Tensor | None, widths: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, kv and rope."""
    q, kv, rope, cos, sin, out, lse_BHT = kept
    num_sequences, num_tokens, num_heads, _, turned, _ = widths
    dout = dout.contiguous()
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    drope = rope.new_empty(rope.shape)
    drope_BHTR = lse_BHT.new_empty(*lse_BHT.shape, turned)
    arguments = _struct(q, kv, cos, sin, documents_BT, widths, scale)
    arguments.rope, arguments.out, arguments.lse = rows(rope), rows(out), lse_BHT.data_ptr()
    arguments.dout, arguments.dq, arguments.dkv = rows(dout), rows(dq), rows(dkv)
    arguments.drope = drope_BHTR.data_ptr()
    run("attend_grad", arguments, num_sequences * num_heads)
    arguments.rope = rows(drope)
    run("rope_grad", arguments, num_sequences * num_tokens)
    return dq, dkv, drope


@_grad.register_fake
def _(
    dout: Tensor, kept: list[Tensor], documents_BT: Tensor | None, widths: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dkv, drope = (tensor.new_empty(tensor.shape) for tensor in kept[:3])
    return dq, dkv, drope


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.widths, ctx.scale = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    *given, documents_BT, out, lse_BHT = ctx.saved_tensors
    kept = [*given, out, lse_BHT]
    return *_grad(dout, kept, documents_BT, ctx.widths, ctx.scale), *(None,) * 5


_attend.register_autograd(_backward, setup_context=_keep)
