"""Blocks that run whole in C++. Oracle: the same modules one by one (`Block.forward`), over
weights that are not rounded, so that all differences are those of the order of sums.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import forked
import rorqual
import small
from patience import HANG_SECONDS
from rorqual.engine.cache_formats import CacheDtype
from rorqual.engine.flat_step import Span
from rorqual.engine.invariant import InvariantRunner
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.served import use_kernels
from rorqual.ops import native
from rorqual.ops.native.layers import NativeLayers, take_seconds
from rorqual.weights import load
from small import lively, relative_error

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
CLOSE = 1e-5
HAS_BF16 = native.level() == "avx512"
NARROW = 2e-2 if HAS_BF16 else CLOSE  # attention over a narrow cache is bfloat16 where that is fast
ODD = small.SMALL.with_changes(
    hidden_size=50,
    moe_intermediate_size=36,
    num_attention_heads=5,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    q_lora_rank=26,
    kv_lora_rank=44,
    qk_nope_head_dim=22,
    qk_rope_head_dim=10,
    v_head_dim=18,
)
"""Widths that fill no vector, heads that fill no tile, groups."""
MANY_HEADS = small.SMALL.with_changes(num_attention_heads=18, n_shared_experts=0)
WIDE_HEADS = small.SMALL.with_changes(hidden_size=32, qk_nope_head_dim=96, qk_rope_head_dim=32)
"""A head's query is wider than a hidden state: what a thread keeps a row in must hold both."""
OTHER_EPSILON = small.SMALL.with_changes(rms_norm_eps=1e-2)
"""Which norms of latents do not have."""
CONFIGS = {
    "odd": ODD,
    "other epsilon": OTHER_EPSILON,
    "wide heads": WIDE_HEADS,
    "many heads, no shared expert": MANY_HEADS,
} | small.variants(small.SMALL)
# A prompt, one token, drafts, a chunk of a prompt, beside a sequence in scattered blocks.
NEAR, FAR = tuple(range(20, 60)), (63, 11, 62, 13, 61)
PLAN = (
    ((0, 100, NEAR),),
    ((100, 101, NEAR), (0, 37, FAR)),
    ((101, 105, NEAR), (37, 38, FAR)),
    ((105, 300, NEAR),),
    ((300, 301, NEAR), (38, 41, FAR)),
)


def native_model(config: ModelConfig, folder: Path, dtype: str = "float32") -> DeepseekV3:
    rorqual.save(lively(config), str(folder), dtype=dtype)
    model = load(folder, "stored")
    use_kernels(model, "native")
    assert model.fused is not None
    return model


def hidden_states(
    model: DeepseekV3, kind: str, *, is_fused: bool = True, block_tokens: int = 16
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each span of PLAN, and the planes of the last layer's cache."""
    cache = PagedLatentCache(
        model.config, (1024 // block_tokens, block_tokens), kind, torch.empty(0)
    )
    fused, found = model.fused, []
    model.fused = fused if is_fused else None
    for spans in PLAN:
        rows = [
            Span([(7 * i + start) % 97 for i in range(start, stop)], start, blocks)
            for start, stop, blocks in spans
        ]
        found += Runner(model, cache).run(rows)
    model.fused = fused
    return found, cache._layers[model.config.num_hidden_layers - 1].planes


def assert_near(found: list[Tensor], wanted: list[Tensor], close: float) -> None:
    for number, (h, expected) in enumerate(zip(found, wanted, strict=True)):
        assert relative_error(h, expected) < close, number


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape_gives_the_hidden_states_of_its_modules(name: str, tmp_path: Path) -> None:
    model = native_model(CONFIGS[name], tmp_path)
    found, planes = hidden_states(model, "float32")
    wanted, wanted_planes = hidden_states(model, "float32", is_fused=False)
    assert_near(found, wanted, CLOSE)
    assert_near(planes, wanted_planes, CLOSE)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "q8"])
def test_every_kind_of_cache_holds_the_same_and_is_read_so(kind: str, tmp_path: Path) -> None:
    # One layer: a choice of experts that tips would be more than rounding.
    config = ODD.with_changes(num_hidden_layers=1, num_nextn_predict_layers=0)
    model = native_model(config, tmp_path)
    found, planes = hidden_states(model, kind)
    wanted, wanted_planes = hidden_states(model, kind, is_fused=False)
    assert_near(found, wanted, NARROW)
    for plane, expected in zip(planes, wanted_planes, strict=True):
        differs = plane.view(torch.uint8) != expected.view(torch.uint8)
        if plane.dtype is not torch.float32:
            assert differs.float().mean() < 2e-3, "sums that lie between two numbers"
        assert torch.allclose(
            plane.float(), expected.float(), rtol=0.13, atol=1.001 if kind == "q8" else 1e-3
        )


@pytest.mark.parametrize("block_tokens", [1, 7, 16])
def test_blocks_of_any_size_are_read_in_place(block_tokens: int, tmp_path: Path) -> None:
    model = native_model(small.SMALL, tmp_path)
    cache = PagedLatentCache(model.config, (700, block_tokens), "float32", torch.empty(0))
    ids = [3 + i % 90 for i in range(200)]
    shuffled = torch.randperm(700, generator=torch.Generator().manual_seed(1)).tolist()
    runner, rows = Runner(model, cache), []
    for start, stop in ((0, 90), (90, 91), (91, 94), (94, 200)):
        rows += runner.run([Span(ids[start:stop], start, shuffled)])
    whole = model.hidden(torch.tensor([ids]))[0]
    assert relative_error(torch.cat(rows), whole) < CLOSE


def test_mtp_modules_run_whole_too(tmp_path: Path) -> None:
    model = native_model(small.SMALL, tmp_path)
    assert model.fused.call(1) is not None
    states = []
    for is_fused in (True, False):
        cache = PagedLatentCache(model.config, (64, 16), "float32", torch.empty(0), 1)
        runner, spans = Runner(model, cache), [Span(list(range(3, 60)), 0, NEAR)]
        kept = model.fused
        h_TD = runner.run(spans)[0]
        if not is_fused:
            model.fused = None
        after = [Span(list(range(4, 60)), 1, NEAR)]
        states += runner.run_mtp(1, after, [h_TD[:-1]])
        later = [Span([9], 57, NEAR)]
        states += runner.run_mtp(1, later, [h_TD[-1:]])
        # One that looks back no further than slot 30, beside one that does.
        two = [Span([9, 8], 57, NEAR, 30), Span([3, 5], 1, FAR)]
        states += runner.run_mtp(1, two, [h_TD[-2:], h_TD[:2]])
        model.fused = kept
    assert_near(states[:4], states[4:], CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_hang_neither_on_threads_nor_on_company(
    dtype: str, tmp_path: Path, one_thread: None
) -> None:
    model = native_model(small.SMALL, tmp_path, dtype)
    found, planes = hidden_states(model, "bf16")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again, again_planes = hidden_states(model, "bf16")
        assert all(map(torch.equal, found, again))
        assert all(map(torch.equal, planes, again_planes))
    cache = PagedLatentCache(model.config, (64, 16), "bf16", torch.empty(0))
    runner = InvariantRunner(model, cache, spare_block=60)
    ids = [3 + i % 90 for i in range(70)]
    alone = runner.run([Span(ids, 0, NEAR)])[0]
    parts = []
    for start, stop in ((0, 41), (41, 42), (42, 70)):
        other = Span(ids[: 1 + start % 3], 0, FAR)
        parts.append(runner.run([other, Span(ids[start:stop], start, NEAR)])[1])
    assert torch.equal(torch.cat(parts), alone)
    logits = runner.logits(alone)
    assert torch.equal(torch.cat([runner.logits(row[None]) for row in alone]), logits)


@pytest.mark.parametrize("kind", ["float32", "bf16", "fp8", "q8"])
@pytest.mark.parametrize("is_invariant", [False, True])
def test_the_bits_do_not_depend_on_which_blocks_a_sequence_has(
    kind: CacheDtype, is_invariant: bool, tmp_path: Path
) -> None:
    """Where they follow each other latents are read in place, else some are gathered."""
    model = native_model(small.SMALL, tmp_path, "bfloat16")
    ids = [3 + i % 90 for i in range(170)]
    found = []
    for blocks in (range(20, 31), [21, 20, 5, 6, 7, 40, 1, 41, 42, 50, 49]):
        cache = PagedLatentCache(model.config, (64, 16), kind, torch.empty(0))
        runner = InvariantRunner(model, cache, 60) if is_invariant else Runner(model, cache)
        cuts = ((0, 100), (100, 101), (101, 104), (104, 170))
        parts = [runner.run([Span(ids[a:b], a, list(blocks))])[0] for a, b in cuts]
        found.append(torch.cat(parts))
    assert torch.equal(*found)


def test_what_moves_or_is_copied_is_fused_again_by_a_choice_alone(tmp_path: Path) -> None:
    model = native_model(small.SMALL, tmp_path)
    copied = copy.deepcopy(model)
    assert copied.fused is None
    found, _ = hidden_states(model, "float32")
    use_kernels(copied, "native")
    with torch.no_grad():
        model.model.norm.weight.zero_()  # the copy has weights of its own
    again, _ = hidden_states(copied, "float32")
    assert all(map(torch.equal, found, again))
    copied.to(torch.float32)
    assert copied.fused is None
    use_kernels(model, "decoded")
    assert model.fused is None, "what decodes a tile at a time is not packed"


def test_a_part_that_is_not_packed_runs_by_its_modules(tmp_path: Path) -> None:
    config = small.SMALL.with_changes(q_lora_rank=21)  # no pairs: BF16 has no packed form
    rorqual.save(lively(config), str(tmp_path), dtype="bfloat16")
    model = load(tmp_path, "stored")
    use_kernels(model, "native")
    assert model.fused is None
    found, _ = hidden_states(model, "float32")
    assert all(h.isfinite().all() for h in found)


def test_layers_are_not_freed_at_the_end_of_the_process(tmp_path: Path) -> None:
    """A thread that nobody waits for may be within a step then."""
    before = set(weakref.finalize._registry)
    model = native_model(small.SMALL, tmp_path)
    made = set(weakref.finalize._registry) - before
    frees = [free for free in made if isinstance((free.peek() or (None,))[0], NativeLayers)]
    assert len(frees) == 2, "the main layers', an MTP module's"
    assert not any(free.atexit for free in frees)
    del model
    gc.collect()
    assert not any(free.alive for free in frees), "but with their model"


def test_seconds_are_counted_by_part(tmp_path: Path) -> None:
    model = native_model(small.SMALL, tmp_path)
    take_seconds()
    hidden_states(model, "float32")
    seconds = take_seconds()
    assert set(seconds) == {"rows", "matrix", "attention", "experts", "routing"}
    assert all(0 < value < 60 for value in seconds.values())
    assert not any(take_seconds().values())


@pytest.mark.parametrize("forced", ["avx2", "portable"])
def test_every_level_is_right(forced: str) -> None:
    """These tests again, in a process that may use no more."""
    if forced == "avx2" and native.level() == "portable":
        return
    environment = os.environ | {"RORQUAL_CPU": forced}
    chosen = "not every_level and (odd or kind_of_cache or company or many)"
    words = ["-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-x", __file__, "-k", chosen]
    done = forked.run(*words, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout.decode()[-3000:]
