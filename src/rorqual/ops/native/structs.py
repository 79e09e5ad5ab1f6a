"""The structs of `rorqual_layers.h`, and the signatures of its functions."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int, c_int64, c_void_p


class Stack(ctypes.Structure):
    _fields_ = [(n, c_int64) for n in ("kind", "num", "rows", "columns")] + [("packed", c_void_p)]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "hidden", "heads", "query_rank", "latent_rank", "rope", "nope", "value",
            "experts", "chosen", "groups", "kept_groups", "best_of_group",
            "is_softmax", "is_normalised",
        )
    ] + [(n, c_double) for n in ("eps", "latent_eps", "softmax_scale", "routed_scale")]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        (name, c_void_p)
        for name in ("input_norm", "query_norm", "latent_norm", "mlp_norm", "router_bias")
    ] + [
        (name, Stack)
        for name in (
            "query_a", "query_b", "latent_a", "keys", "values", "output", "router",
            "gate", "up", "down", "expert_gate", "expert_up", "expert_down",
        )
    ]  # fmt: skip


CACHE_KINDS = {"float32": 0, "bf16": 1, "fp8": 2, "q8": 3}


class Cache(ctypes.Structure):
    """One layer's planes, of a kind in `CACHE_KINDS`."""

    _fields_ = [("kind", c_int64), ("planes", c_void_p * 3)]


class Ends(ctypes.Structure):
    _fields_ = [(name, Stack) for name in ("embedding", "joint", "head")] + [
        (name, c_void_p) for name in ("embedding_norm", "state_norm", "last_norm")
    ]


class Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in ("num_threads", "num_tokens", "num_spans", "block_tokens", "num_positions")
        ),
        *((n, c_void_p) for n in ("ids", "tables", "spans", "cos", "sin", "states", "hidden")),
        ("num_rows", c_int64),
        ("rows", c_void_p),
        ("logits", c_void_p),
        ("num_ids", c_int64),
        ("likeliest", c_void_p),
    ]


LAYER_SIGNATURES = {
    "rq_layers_make": (c_void_p, [POINTER(Shape), POINTER(Ends), POINTER(Layer), c_int64]),
    "rq_layers_free": (None, [c_void_p]),
    "rq_layers_run": (c_int, [c_void_p, POINTER(Cache), POINTER(Step)]),
    "rq_take_seconds": (None, [POINTER(c_double)]),
}
