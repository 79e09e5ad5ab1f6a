"""Batch invariance on every way that a product with bfloat16 weights may take.

Oracle: the bits of the same answer alone. Which way is taken depends on the processor; here a test
chooses: torch's own bfloat16, or weights that are widened.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import ALWAYS, CONFIG, guessing
from torch import Tensor

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.flat_step import Span
from rorqual.engine.invariant import ROWS, InvariantRunner, TileDispatcher
from rorqual.engine.logprobs import TokenLogprob, token_logprobs
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.sampler import Row, choose
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import Scores, verify
from rorqual.model import DeepseekV3, build
from rorqual.model.moe import Experts
from rorqual.model.router import Routing
from rorqual.model.served import use_kernels
from rorqual.ops.swiglu import swiglu
from rorqual.tokenizer import Tokenizer

PATHS = ["torch", "widened"]
NUM_ROWS = [2, 7, 8, 9, 24, 25, 26, 33]
PAST = 20
"""Tokens before those that are compared: more than a block."""
# One expert a token, so that a token alone and its dummies make as few rows as there can be.
ONE_CHOICE = CONFIG.with_changes(num_experts_per_tok=1, num_nextn_predict_layers=0)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bfloat16(model: DeepseekV3) -> DeepseekV3:
    biases = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.bfloat16()
    for name, buffer in biases.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    return model.eval()


def runner_of(model: DeepseekV3) -> InvariantRunner:
    like = model.model.embed_tokens.weight.detach()
    return InvariantRunner(model, PagedLatentCache(model.config, (100, 16), "auto", like), 99)


def text(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


def last_row(runner: InvariantRunner, others: list[Span], ids: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden state and logits of the last of `ids` beside the others; its past runs before."""
    blocks = [97, 98]
    runner.run([Span(ids[:-1], 0, blocks)])
    middle = len(others) // 2
    spans = [*others[:middle], Span(ids[-1:], len(ids) - 1, blocks), *others[middle:]]
    h_ND = torch.cat([rows[-1:] for rows in runner.run(spans)])
    return h_ND[middle], runner.logits(h_ND)[middle]


def test_a_row_has_the_bits_that_it_has_alone(path: str) -> None:
    """Beside single tokens, and beside prompts and single tokens."""
    model, ids = bfloat16(build(ONE_CHOICE, seed=3)), text(1, PAST)
    use_kernels(model, path)
    alone = last_row(runner_of(model), [], ids)
    for num_rows in NUM_ROWS:
        decodes = [Span([5 + n], 0, [n]) for n in range(num_rows - 1)]
        prompts = [Span(text(n, 1 + 5 * n), 0, [80 + 2 * n, 81 + 2 * n]) for n in range(4)]
        for others in (decodes, [*decodes[:-1], *prompts]):
            for ours, wanted in zip(last_row(runner_of(model), others, ids), alone, strict=True):
                assert torch.equal(ours, wanted), (path, num_rows, len(others))


def test_answers_have_the_bits_that_they_have_alone(path: str, tokenizer: Tokenizer) -> None:
    """With drafts and without, with a beginning from the cache and without."""
    model = bfloat16(guessing(1))
    shared = text(9, 40)
    prompts = [[*shared, *text(n, 1 + n)] for n in range(4)] + [
        text(n, 3 * n + 1) for n in range(5)
    ]
    # Cold enough that some drafts are right.
    params = SamplingParams(temperature=0.2, seed=3, max_tokens=6, logprobs=2, ignore_eos=True)

    def engine(**options: Any) -> Engine:
        return Engine(model, tokenizer, is_batch_invariant=True, kernels=path, **options)

    alone = engine(max_batch=1, use_prefix_cache=False).generate(prompts, params)
    drafting = engine(speculate=2, draft_policy=ALWAYS, max_step_tokens=43)
    for _ in range(2):  # the second time every prompt's beginning is in the cache
        assert drafting.generate(prompts, params) == alone
    stats = drafting.stats()
    assert stats.num_prefix_hit_tokens > len(shared)
    assert sum(stats.accepted) > 0
    assert engine(max_batch=3).generate(prompts, params) == alone


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("num_threads", [1, 3, 6])
def test_how_threads_share_the_rows_of_experts_changes_no_bit(num_threads: int) -> None:
    """Six threads share 32 rows of 1,408 values at places that are no multiple of a vector."""
    torch.set_num_threads(num_threads)
    routing = Routing(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 8))
    tile_rows = TileDispatcher().dispatch(torch.zeros(1, 4), routing, 8).tile_rows
    gate_NI = torch.randn(ROWS, 2 * 1408, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1)
    alone = swiglu(gate_NI.chunk(2, -1)[0], ones, tile_rows)
    for num_others in range(1, 7):
        beside = torch.cat([gate_NI.flip(0)] * num_others + [gate_NI]).chunk(2, -1)[0]
        assert torch.equal(swiglu(beside, ones, tile_rows)[-ROWS:], alone)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_experts_have_rows_changes_no_bit_of_one(
    dtype: torch.dtype, num_threads: int
) -> None:
    """Both products with what lies between; compared at one and the same number of threads."""
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(CONFIG.with_changes(moe_intermediate_size=1408)).to(dtype)
    for weight in (experts.gate_up_proj, experts.down_proj):
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    x_TD = torch.randn(ROWS, CONFIG.hidden_size, generator=generator).to(dtype)

    def rows_of_expert_7(num_others: int) -> Tensor:
        """Every token chooses expert 7, and so many of the others beside it."""
        others = torch.arange(num_others).repeat(ROWS, 1)
        chosen_TK = torch.cat([others, torch.full((ROWS, 1), 7)], dim=1)
        routing = Routing(torch.ones(chosen_TK.shape), chosen_TK, torch.zeros(ROWS, 8))
        return experts(TileDispatcher().dispatch(x_TD, routing, 8))[-ROWS:]

    with torch.inference_mode():
        alone = rows_of_expert_7(0)
        for num_others in range(1, 7):
            assert torch.equal(rows_of_expert_7(num_others), alone), num_others


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_how_many_rows_of_logits_there_are_changes_no_bit(num_threads: int) -> None:
    """A vocabulary that no vector divides, so that every row begins elsewhere in one."""
    torch.set_num_threads(num_threads)
    logits_NV = torch.randn(33, 40_003, generator=torch.Generator().manual_seed(0)) * 4
    ids = logits_NV.argmax(-1).tolist()
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.01}]
    rows = [
        Row(SamplingParams(temperature=0.7, **kinds[n % 3]), u)
        for n, u in enumerate(torch.linspace(0, 0.999, 33).tolist())
    ]
    drawn = choose(logits_NV, range(33), rows, is_row_by_row=True).tolist()
    scored = token_logprobs(logits_NV, ids, 3, 40_003, is_row_by_row=True)
    for n in range(33):
        row = logits_NV[n : n + 1].clone()
        assert drawn[n] == int(choose(row, [0], rows[n : n + 1]))
        assert scored[n] == token_logprobs(row, ids[n : n + 1], 3, 40_003)[0]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_accepted_drafts_have_the_logprobs_of_tokens_one_by_one(num_threads: int) -> None:
    """An answer's rows meet where several drafts are accepted in one step."""
    torch.set_num_threads(num_threads)
    logits_NV = torch.randn(33, 40_003, generator=torch.Generator().manual_seed(0)) * 4
    ids = logits_NV.argmax(-1).tolist()
    vocabulary: Any = SimpleNamespace(vocab_size=40_003, eos_id=0, special_ids={})

    def logprobs(rows_NV: Tensor, drafts: list[int]) -> tuple[TokenLogprob, ...]:
        params = SamplingParams(temperature=0, logprobs=3, ignore_eos=True)
        state = SamplingState(params, [1], vocabulary)
        return verify(Scores(rows_NV), [drafts], [state], is_row_by_row=True)[0].logprobs

    one_by_one = [logprobs(logits_NV[n : n + 1].clone(), [])[0] for n in range(33)]
    assert list(logprobs(logits_NV, ids[:-1])) == one_by_one
