"""Shapes that fill no block, tile or vector, by the C++ kernels. Oracle: the same file by the plain
path, which decodes every matrix; and a process, or a thread, that has an engine to itself.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rorqual
import small
from patience import HANG_SECONDS
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3
from rorqual.model.served import use_kernels
from rorqual.ops import native
from rorqual.weights import load
from small import lively, relative_error

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
CLOSE = 1e-5  # float32 sums
STREAMS = 33
SHAPES = {
    "17 experts": {"n_routed_experts": 17, "num_experts_per_tok": 3},
    "an expert a token": {"num_experts_per_tok": 1},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "every expert": {"n_routed_experts": 5, "num_experts_per_tok": 5},
    "300 narrow experts": {"n_routed_experts": 300, "num_experts_per_tok": 9,
                           "moe_intermediate_size": 3},
    "experts of 8": {"moe_intermediate_size": 8},
    "experts of 1": {"moe_intermediate_size": 1, "intermediate_size": 1},
    "odd tied vocabulary": {"vocab_size": 331, "tie_word_embeddings": True},
    "widths of 1": {"qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1,
                    "kv_lora_rank": 1},
    "hidden 33": {"hidden_size": 33, "q_lora_rank": 7, "kv_lora_rank": 9},
    "one head, no latent of queries": {"num_attention_heads": 1, "q_lora_rank": None},
    "one sparse layer": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "all dense": {"num_hidden_layers": 2, "first_k_dense_replace": 2},
}  # fmt: skip


def states(model: DeepseekV3) -> list[Tensor]:
    """Prompts of one token in 33 streams, a step of all of them, then a long one beside them."""
    cache = PagedLatentCache(model.config, (STREAMS + 8, 16), "float32", torch.empty(0))
    rest = tuple(range(STREAMS, STREAMS + 8))
    steps = [
        [Span([3 + stream], 0, (stream,)) for stream in range(STREAMS)],
        [Span([7 + stream], 1, (stream,)) for stream in range(STREAMS)],
        [Span(list(range(3, 104)), 0, rest), Span([9], 2, (0,)), Span([5, 6, 7], 2, (1,))],
    ]
    return [h for step in steps for h in Runner(model, cache).run(step)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_what_decoded_weights_give(name: str, tmp_path: Path) -> None:
    config = small.LITTLE.with_changes(**SHAPES[name])
    rorqual.save(lively(config), str(tmp_path), dtype="float32")
    packed, decoded = load(tmp_path, "stored"), load(tmp_path, "stored", kernels="decoded")
    use_kernels(packed, "native")
    use_kernels(decoded, "decoded")
    for number, (h, expected) in enumerate(zip(states(packed), states(decoded), strict=True)):
        assert h.isfinite().all()
        assert relative_error(h, expected) < CLOSE, number


PROMPTS = [[3], [3, 4, 5, 6], list(range(3, 40))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def answers(engine: Engine) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rorqual.save(lively(small.LITTLE), str(tmp_path), dtype="bfloat16")
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.concurrency
def test_a_forked_child_uses_the_engine_that_its_parent_used(folder: Path) -> None:
    """The kernels' threads are the parent's: the child makes its own."""
    engine = Engine(folder, small.tokenizer(), dtype="native")
    expected = answers(engine)
    if (child := os.fork()) == 0:
        code = 1
        try:
            threading.Timer(HANG_SECONDS, lambda: os._exit(2)).start()
            code = 0 if answers(engine) == expected else 3
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert answers(engine) == expected


@pytest.mark.concurrency
def test_threads_with_an_engine_each_disturb_nobody(folder: Path) -> None:
    engines = [Engine(folder, small.tokenizer(), dtype="native", max_batch=n) for n in (1, 2, 8)]
    expected = answers(engines[0])
    found: list[list[list[int]]] = []

    def work(engine: Engine) -> None:
        found.extend(answers(engine) for _ in range(3))

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 9
