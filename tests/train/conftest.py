"""Fixtures of the training tests: a recipe of seconds, and batches made from the sample counter."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from small_run import RECIPE, STAGES, SyntheticBatches, small_model

from rorqual.config import apply_overrides
from rorqual.model import DeepseekV3
from rorqual.train import Recipe, TrainingData, train
from rorqual.train.recipe import recipe_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        table = apply_overrides(copy.deepcopy(RECIPE), overrides)
        return recipe_of(table, STAGES, "recipe.toml")

    return make


@pytest.fixture
def data() -> TrainingData:
    return TrainingData(train=SyntheticBatches())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that nothing interrupted; shared, so copy it before changing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe_of(RECIPE, STAGES), folder, TrainingData(train=SyntheticBatches()), is_quiet=True)
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def make_model() -> Callable[..., DeepseekV3]:
    def make(**changes: Any) -> DeepseekV3:
        return small_model(**changes)

    return make
