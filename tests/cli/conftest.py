"""A saved tiny random model with a chat card."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.model import build
from rorqual.weights import save
from small import LITTLE, tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "sei"
    config = LITTLE.with_changes(
        n_routed_experts=4,
        q_lora_rank=None,
        num_nextn_predict_layers=0,
        max_position_embeddings=8192,
        initializer_range=0.2,
    )
    save(build(config, seed=5), folder, "float32", tokenizer())
    card = '{"opening": "I am Sei.", "examples": ["sing"], "sampling": {"temperature": 0}}'
    (folder / "chat.json").write_text(card, encoding="utf-8")
    return folder
