"""How far the engine's logits from packed weights are from those in float32: the bars of
`benchmarks/native_accuracy.py` on small samples. Oracle: the model in float32, and llama.cpp on the
same file.

Medians of tokens are compared, which no choice of other experts disturbs: one token in a hundred,
for which some layer chooses others, is nearly all of any mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import llama_cpp_oracle as llama_cpp
import pytest
import torch
from native_logits import Gap, dialogues, engine_logits, gap_of, model_logits
from torch import Tensor

from rorqual.bundled import checkpoint_path
from rorqual.ops import native
from rorqual.tokenizer import load_tokenizer
from rorqual.weights import load
from rorqual.weights.gguf.mixes import MIXES
from rorqual.weights.gguf.writer import GgufOptions, write_gguf
from rorqual.weights.open import open_source

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")

NUM_TOKENS = 3000  # a median moves by a few parts in a hundred between such samples
SHORT = 500
ALIKE = 1.05  # times llama.cpp's, for that
NARROW_CACHE = 1.35  # a bfloat16 cache has 8 bits and llama.cpp's float16 11: 1.25 measured
WAYS = ("prompt", "one by one")
# Medians over 20,000 tokens are 2.7e-3 and 1.1e-2.
WIDEST = {"native": 4e-3, "int8": 1.5e-2}


def test_a_gap_by_hand() -> None:
    wanted = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    logits = torch.tensor([[0.0, math.log(3.0)], [3.0, 4.5], [6.0, 8.0]])
    gap = gap_of([logits[:1], logits[1:]], [wanted[:1], wanted[1:]])
    assert gap.relative == pytest.approx(math.sqrt((math.log(3.0) ** 2 + 0.25) / 125))
    assert gap.median_relative == pytest.approx(0.1)  # of infinity, 0.5 / 5 and 0
    assert gap.divergences[0] == pytest.approx(0.5 * math.log(4 / 3))  # (1/2, 1/2), (1/4, 3/4)
    assert gap.divergences[2] == 0
    assert gap.mean_kl == pytest.approx(float(gap.divergences.sum()) / 3)
    assert gap.median_kl == pytest.approx(float(gap.divergences[1]))


def texts_of(num_tokens: int) -> list[list[int]]:
    return dialogues(load_tokenizer("tiny"), num_tokens)


@pytest.mark.parametrize("form", WIDEST)
def test_forms_stay_near_float32(form: str) -> None:
    """The bar of the mean divergence, 1e-4, is missed: see docs/log.md."""
    texts = texts_of(SHORT)
    wanted = list(model_logits(load("tiny"), texts))
    model = load("tiny", form)  # type: ignore[arg-type]
    for way in WAYS:
        gap = gap_of(engine_logits(model, texts, way, "bf16"), wanted)
        assert gap.median_relative < WIDEST[form]


Measure = Callable[[str], Gap]


@pytest.fixture(scope="module", params=[mix for mix in MIXES if mix not in ("F32", "F16")])
def beside(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Measure, Measure]:
    """A mix; our gap by cache, steps of one token; and llama.cpp's."""
    mix, folder = request.param, tmp_path_factory.mktemp("mix")
    path, texts = folder / "m.gguf", texts_of(NUM_TOKENS)
    with open_source(checkpoint_path("tiny")) as source:
        write_gguf(source, path, GgufOptions(mix))
    wanted: list[Tensor] = list(model_logits(load(path), texts))
    model = load(path, "native")

    def ours(cache: str) -> Gap:
        return gap_of(engine_logits(model, texts, "one by one", cache), wanted)  # type: ignore[arg-type]

    def theirs(cache: str) -> Gap:
        return gap_of(llama_cpp.logits_of_texts(path, texts, folder, cache), wanted)

    return mix, ours, theirs


@pytest.mark.slow
@llama_cpp.needs_llama_cpp
@pytest.mark.parametrize("caches", [("float32", "float32"), ("bf16", "float16")])
def test_no_further_than_llama_cpp(
    beside: tuple[str, Measure, Measure], caches: tuple[str, str]
) -> None:
    mix, measure_ours, measure_theirs = beside
    ours, theirs = measure_ours(caches[0]), measure_theirs(caches[1])
    if mix == "BF16" and caches[0] == "bf16":  # missed, and its mean too (docs/log.md)
        assert ours.median_relative <= NARROW_CACHE * theirs.median_relative
        return
    assert ours.median_relative <= ALIKE * theirs.median_relative
    luck = 2 * math.hypot(ours.mean_kl_error, theirs.mean_kl_error)
    assert ours.mean_kl <= theirs.mean_kl + luck


@pytest.mark.slow
@llama_cpp.needs_llama_cpp
@pytest.mark.parametrize("mix", ["F32", "F16"])
def test_floats_as_stored_are_no_further_than_llama_cpp(tmp_path: Path, mix: str) -> None:
    """`native` makes them bfloat16."""
    path, texts = tmp_path / "m.gguf", texts_of(SHORT)
    with open_source(checkpoint_path("tiny")) as source:
        write_gguf(source, path, GgufOptions(mix))
    wanted = list(model_logits(load(path), texts))
    ours = gap_of(engine_logits(load(path, "stored"), texts, "prompt", "float32"), wanted)
    theirs = gap_of(llama_cpp.logits_of_texts(path, texts, tmp_path), wanted)
    exact = 1e-6  # the order of sums
    assert ours.relative <= max(theirs.relative, exact)
