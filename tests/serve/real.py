"""The real engine over a tiny random model, for the tests that need its blocks and its grammars."""

from __future__ import annotations

from typing import Any

from served import make_model

from rorqual.engine import AsyncEngine, Engine
from rorqual.model import ModelConfig, build
from rorqual.serve.settings import ServedModel
from rorqual.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    num_nextn_predict_layers=1,
    max_position_embeddings=2048,
    initializer_range=0.2,
)


def make_engine(tokenizer: Tokenizer, **options: Any) -> Engine:
    return Engine(build(CONFIG, seed=5).eval(), tokenizer, **options)


def serve_engine(engine: Engine, *, max_queue: int = 256) -> tuple[AsyncEngine, ServedModel]:
    """What `create_app` takes."""
    model = make_model(engine.tokenizer, max_positions=engine.max_positions)
    return AsyncEngine(engine, max_queue=max_queue), model
