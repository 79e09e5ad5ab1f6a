"""Oracle: the same model without a cache, over each text by itself."""

from __future__ import annotations

import pytest
import torch

from rorqual.engine.cache_formats import CacheDtype, bytes_per_token, store
from rorqual.engine.flat_step import MAX_TOGETHER_SLOTS, Span
from rorqual.engine.paged_cache import PagedLatentCache, block_bytes
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3
from rorqual.ops.native.structs import CACHE_KINDS
from small import relative_error

FLOAT32_RELATIVE = 1e-5  # the same sums in another order
# Of the logits, for what each format keeps: bf16 8 bits, q8 7 bits of 32 values' peak and bf16
# rotary keys, fp8 3 bits and a half. A random model has no redundancy that would hide them.
RELATIVE: dict[CacheDtype, float] = {"bf16": 1e-2, "q8": 2e-2, "fp8": 5e-2}
SHAPE = (60, 4)


def runner(
    model: DeepseekV3, kind: CacheDtype = "float32", shape: tuple[int, int] = SHAPE
) -> Runner:
    like = model.model.embed_tokens.weight.detach()
    return Runner(model, PagedLatentCache(model.config, shape, kind, like, num_depths=1))


def tables(*lengths: int) -> list[list[int]]:
    """Blocks of sequences that lie scattered and backwards in the pool."""
    order = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(0)).tolist()
    return [[order.pop() for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("kind", ["float32", "bf16", "fp8", "q8"])
def test_the_kernels_are_told_each_plane(model: DeepseekV3, kind: CacheDtype) -> None:
    """Of every layer, MTP depths too; once, for planes never move."""
    like = model.model.embed_tokens.weight.detach()
    cache = PagedLatentCache(model.config, SHAPE, kind, like, num_depths=1)
    assert cache.structs is cache.structs
    for struct, layer in zip(cache.structs, cache._layers, strict=True):
        assert struct.kind == CACHE_KINDS[kind]
        pointers = [plane.data_ptr() for plane in layer.planes]
        assert [p or 0 for p in struct.planes] == pointers + [0] * (3 - len(pointers))


@pytest.mark.parametrize("chunk", [1, 3, 40])
@pytest.mark.parametrize("is_scattered", [False, True])
@torch.no_grad()
def test_chunks_equal_the_whole(model: DeepseekV3, chunk: int, is_scattered: bool) -> None:
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = tables(10)[0] if is_scattered else list(range(5, 15))
    ours, run = [], runner(model).run
    for start in range(0, 40, chunk):
        ours += run([Span(ids[start : start + chunk], start, blocks)])
    theirs = model.hidden(torch.tensor([ids]))[0]
    assert relative_error(torch.cat(ours), theirs) < FLOAT32_RELATIVE


@torch.no_grad()
def test_a_flat_step_mixes_everything(model: DeepseekV3, prompts: list[list[int]]) -> None:
    """Decodes, drafts and chunks of ragged sequences, in a step whose order is not the caller's."""
    ours = runner(model)
    blocks = tables(2, 4, 24, 4, 10)
    texts = [[*prompt, 7, 8, 9, 10, 11, 12][:95] for prompt in prompts[:5]]
    last = [1, 3, 60, 1, 3]  # how many tokens of each run in the step that is looked at
    begun = [
        Span(text[:-count], 0, table)
        for text, count, table in zip(texts, last, blocks, strict=True)
    ]
    ours.run(begun)
    ends = [
        Span(text[-count:], len(text) - count, table)
        for text, count, table in zip(texts, last, blocks, strict=True)
    ]
    for h_TD, text, count in zip(ours.run(ends), texts, last, strict=True):
        theirs = model.hidden(torch.tensor([text]))[0, -count:]
        assert relative_error(h_TD, theirs) < FLOAT32_RELATIVE


@torch.no_grad()
def test_long_sequences_attend_alone(model: DeepseekV3) -> None:
    """Beyond the limit of company the same comes out."""
    long = model.config.with_changes(max_position_embeddings=2 * MAX_TOGETHER_SLOTS)
    ours = runner(model, shape=(300, 4))
    ids = torch.randint(0, 300, (MAX_TOGETHER_SLOTS + 5,)).tolist()
    assert len(ids) < long.max_position_embeddings
    table = list(range(260))
    ours.run([Span(ids[:-2], 0, table), Span(ids[:9], 0, [270, 280, 290])])
    outs = ours.run([Span(ids[-2:], len(ids) - 2, table), Span(ids[9:11], 9, [270, 280, 290])])
    for h_TD, text in zip(outs, (ids, ids[:11]), strict=True):
        theirs = model.hidden(torch.tensor([text]))[0, -2:]
        assert relative_error(h_TD, theirs) < FLOAT32_RELATIVE


@torch.no_grad()
def test_mtp_latents_lie_beside_the_token_they_took(model: DeepseekV3) -> None:
    ids = torch.randint(0, 300, (30,), generator=torch.Generator().manual_seed(0))
    h = model.hidden(ids[None, :-1])
    theirs = model.mtp_hidden(1, h, ids[None, 1:])[0]
    ours, parts, table = runner(model), [], tables(8)[0]
    for start in range(1, 30, 7):
        text = ids[start : start + 7].tolist()
        rows = h[0, start - 1 : start - 1 + len(text)]
        parts += ours.run_mtp(1, [Span(text, start, table)], [rows])
    assert relative_error(torch.cat(parts), theirs) < FLOAT32_RELATIVE


@pytest.mark.parametrize("kind", RELATIVE)
@torch.no_grad()
def test_small_formats_stay_near(model: DeepseekV3, kind: CacheDtype) -> None:
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    ours, table = runner(model, kind), tables(15)[0]
    start = torch.cat(ours.run([Span(ids[:50], 0, table)]))
    parts = [start, *(ours.run([Span(ids[at : at + 1], at, table)])[0] for at in range(50, 60))]
    theirs = model(torch.tensor([ids]))[0]
    errors = (ours.logits(torch.cat(parts)) - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    # The median token: where two experts nearly tie, a token may route differently.
    assert float(errors.median()) < RELATIVE[kind]


@pytest.mark.parametrize(("kind", "bits"), [("q8", 7), ("fp8", 4)])
def test_what_is_stored_is_close_and_zero_stays_zero(
    model: DeepseekV3, kind: CacheDtype, bits: int
) -> None:
    config = model.config.with_changes(kv_lora_rank=70)  # two groups of 32 and a rest
    layer = store(config, (4, 8), kind, torch.empty(0))
    values_ML = torch.randn(32, config.latent_dim) * torch.logspace(-3, 3, 32)[:, None]
    values_ML[5] = 0
    back = layer.decode(layer.encode(values_ML))
    peak = values_ML.abs().amax(-1, keepdim=True)
    assert float(((back - values_ML).abs() / peak.clamp_min(1e-9)).max()) < 2.0**-bits
    assert not back[5].any()


def test_the_bytes_of_a_token() -> None:
    """671B in bf16: (512 + 64) values of two bytes, 70 KB through its 61 layers."""
    from rorqual.model import preset

    config = preset("671b")
    assert bytes_per_token(config, "bf16", torch.float32) == 576 * 2
    assert bytes_per_token(config, "auto", torch.bfloat16) == 576 * 2
    assert bytes_per_token(config, "fp8", torch.bfloat16) == 512 + 4 + 128
    assert bytes_per_token(config, "q8", torch.bfloat16) == 512 + 32 + 128
    size = block_bytes(config, 16, "bf16", torch.bfloat16, num_depths=1)
    assert size == 62 * 16 * 1152 + 7168 * 2


def test_an_engine_takes_the_memory_it_was_given(model: DeepseekV3) -> None:
    like = model.model.embed_tokens.weight.detach()
    for kind in ("float32", "bf16", "fp8", "q8"):
        cache = PagedLatentCache(model.config, (12, 16), kind, like, num_depths=1)
        assert cache.num_bytes == 12 * block_bytes(model.config, 16, kind, torch.float32, 1)
