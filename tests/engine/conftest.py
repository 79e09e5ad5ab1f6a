"""A tiny random model and a tokenizer trained on the spot; the model has rows beyond its ids."""

from __future__ import annotations

import pytest
import torch
from small_models import CONFIG, guessing

import small
from rorqual.model import DeepseekV3, build
from rorqual.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small.tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> DeepseekV3:
    assert tokenizer.vocab_size < CONFIG.vocab_size
    return build(CONFIG, seed=3).eval()


@pytest.fixture(scope="session", params=[1, 3])
def guesser(request: pytest.FixtureRequest) -> DeepseekV3:
    return guessing(request.param)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Six prompts of ragged lengths, 1 to 90 ids."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 7, 90, 8, 33, 3]
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
