"""Numbers that are not finite in whole layers: they are told, and disturb no other sequence.
Oracle: the same modules one by one, and the same sequence alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import forked
import rorqual
import small
from patience import HANG_SECONDS
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.cache_formats import CacheDtype
from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.mtp import MtpModule
from rorqual.model.served import use_kernels
from rorqual.ops import native
from rorqual.ops.packed import pack_into, unpack
from rorqual.weights import load
from small import lively

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
NAN, NAN_ID = float("nan"), 5
BLOCKS, OTHERS = tuple(range(20, 60)), (1, 2)
WIDE = small.SMALL.with_changes(
    hidden_size=1024,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    n_routed_experts=16,
    num_experts_per_tok=8,
    n_group=1,
    topk_group=1,
)
"""As wide as the outputs that a thread makes at a time, with many experts a token."""


def broken_model(config: ModelConfig, folder: Path, dtype: str = "float32") -> DeepseekV3:
    """The embedding of `NAN_ID` is no number."""
    model = lively(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_ID] = NAN
    rorqual.save(model, str(folder), dtype=dtype)
    made = load(folder, "stored")
    use_kernels(made, "native")
    assert made.fused is not None
    return made


def cache_of(model: DeepseekV3, kind: CacheDtype = "float32") -> PagedLatentCache:
    return PagedLatentCache(model.config, (64, 16), kind, torch.empty(0))


@pytest.mark.parametrize("num_broken", [1, 15, 40])
def test_other_sequences_are_as_if_they_were_alone(num_broken: int, tmp_path: Path) -> None:
    """Each token has as many experts as it should, whatever their scores are: what a thread keeps
    of an expert has room for the tokens of a step.
    """
    model, fine = broken_model(WIDE, tmp_path), Span([7], 0, OTHERS)
    alone = Runner(model, cache_of(model)).run([fine])[0]
    broken = Span([NAN_ID] * num_broken, 0, BLOCKS)
    for _ in range(3):
        found, beside = Runner(model, cache_of(model)).run([broken, fine])
        assert found.isnan().all()
        assert torch.equal(beside, alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["float32", "bf16", "fp8", "q8"])
def test_every_cache_keeps_what_is_no_number(kind: CacheDtype, dtype: str, tmp_path: Path) -> None:
    """So the prompt's next token tells, though no logits of the broken one were wanted."""
    model = broken_model(small.SMALL, tmp_path, dtype)
    for num_later in (1, 20):
        runner = Runner(model, cache_of(model, kind))
        before = runner.run([Span([7, 8, 9], 0, BLOCKS)])[0]
        runner.run([Span([NAN_ID], 3, BLOCKS)])
        later = runner.run([Span([11] * num_later, 4, BLOCKS)])[0]
        assert before.isfinite().all()
        assert later.isnan().all()


@pytest.mark.parametrize("num_later", [1, 20])
def test_a_rotary_key_that_is_no_number_is_seen(num_later: int, tmp_path: Path) -> None:
    model = broken_model(small.SMALL, tmp_path)
    for kind in ("float32", "bf16"):
        cache = cache_of(model, kind)
        runner = Runner(model, cache)
        runner.run([Span([7, 8, 9], 0, BLOCKS)])
        cache._layers[0].planes[0][BLOCKS[0], 1, -1] = NAN
        assert runner.run([Span([11] * num_later, 3, BLOCKS)])[0].isnan().all()


def test_a_routers_row_that_is_no_number_is_seen(tmp_path: Path) -> None:
    """torch takes it for the largest."""
    model = lively(small.SMALL)
    with torch.no_grad():
        next(iter(model.routers())).weight[2] = NAN
    rorqual.save(model, str(tmp_path), dtype="float32")
    made = load(tmp_path, "stored")
    use_kernels(made, "native")
    span = [Span([7, 8, 9], 0, BLOCKS)]
    assert Runner(made, cache_of(made)).run(span)[0].isnan().all()
    made.fused = None
    assert Runner(made, cache_of(made)).run(span)[0].isnan().all()


@pytest.mark.parametrize("max_drafts", [1, 3])
def test_drafts_that_are_no_tokens_cost_no_text(max_drafts: int, tmp_path: Path) -> None:
    """An MTP module whose weights are broken drafts nothing of use."""
    rorqual.save(lively(small.SPOKEN), str(tmp_path), dtype="float32")
    texts = []
    for is_broken in (False, True):
        model = load(tmp_path, "stored")
        use_kernels(model, "native")
        (module,) = (m for m in model.modules() if isinstance(m, MtpModule))
        if is_broken:
            stack = module.eh_proj.stack
            rows = torch.full(stack.shape[1:], NAN).view(torch.uint8)
            pack_into(stack.packed_EP[0], rows, stack.kind, stack.shape[2])
            assert unpack(stack.packed_EP[0], "F32", stack.shape[2], 0, 1).any()
        engine = Engine(model, small.tokenizer(), speculate=max_drafts)
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        texts.append([a.token_ids for a in engine.generate([[5, 6, 7], [9, 8]], params)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("forced", ["avx2", "portable"])
def test_every_level_tells_it(forced: str) -> None:
    """These tests again, in a process that may use no more."""
    if forced == native.level():
        return
    environment = os.environ | {"RORQUAL_CPU": forced}
    flags = ["-n0", "-q", "-p", "no:cacheprovider", "-x", "-k", "not every_level"]
    done = forked.run("-m", "pytest", *flags, __file__, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout.decode()[-3000:]
