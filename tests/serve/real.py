"""The real engine over a tiny random model, for the tests that need its blocks and its grammars."""

from __future__ import annotations

from typing import Any

from served import make_model

from rorqual.engine import AsyncEngine, Engine
from rorqual.model import build
from rorqual.serve.settings import ServedModel
from rorqual.tokenizer import Tokenizer
from small import LITTLE

CONFIG = LITTLE.with_changes(
    n_routed_experts=4, max_position_embeddings=2048, initializer_range=0.2
)


def make_engine(tokenizer: Tokenizer, **options: Any) -> Engine:
    return Engine(build(CONFIG, seed=5).eval(), tokenizer, **options)


def serve_engine(engine: Engine, *, max_queue: int = 256) -> tuple[AsyncEngine, ServedModel]:
    """What `create_app` takes."""
    model = make_model(engine.tokenizer, max_positions=engine.max_positions)
    return AsyncEngine(engine, max_queue=max_queue), model
