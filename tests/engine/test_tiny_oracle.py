"""The engine over the bundled model, against transformers with the same weights.

Oracle: transformers' `generate` in float32, each prompt alone, once for the whole file. Whatever
company an answer has, however its prompt is cut, whatever was in the cache and whatever was
drafted, its tokens are transformers'. Tokens are compared for equality; the smallest gap between
the two likeliest tokens that transformers saw shows that rounding could not have chosen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_models import ALWAYS, memory_of
from torch import Tensor

from rorqual.corpus_writer import SKILLS
from rorqual.engine import Engine, Output, Request, SamplingParams
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder, save

NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
# Two float32 sums of these logits, which are of order 10, differ by about 1e-5.
LEAST_GAP = 1e-4
BLOCK = 128  # rows and columns of one FP8 scale
PLAIN = ("The", "Once upon a time there was a fox who", "def add(a, b):\n    return", "7 x 8 = ")
FEW_BLOCKS = 13


@dataclass
class Tiny:
    """The bundled model, 20 prompts, and what transformers answers to each."""

    model: DeepseekV3
    tokenizer: Tokenizer
    prompts: list[list[int]]
    expected: list[list[int]] = field(default_factory=list)
    least_gap: float = float("inf")
    theirs: Any = None


def make_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """A question of every skill, longer conversations of them, and plain texts."""
    asked = [next(skill.questions("held_out", 11)) for skill in SKILLS.values()]
    chats = [question.messages for question in asked]
    for first in (0, 3, 6):
        turns: list[dict[str, Any]] = [{"role": "system", "content": "Answer in few words."}]
        for question in asked[first : first + 3]:
            turns.append({"role": "user", "content": question.prompt})
            turns.append({"role": "assistant", "content": question.answer})
        chats.append(turns[:-1])
    chats.append([*chats[11][1:], {"role": "assistant", "content": "I"}, *chats[8]])
    chats.append([{"role": "user", "content": "Tell me a story about " + "a fox and " * 40}])
    prompts = [tokenizer.encode_chat(chat) for chat in chats]
    return prompts + [tokenizer.encode(text, bos=True) for text in PLAIN]


@torch.no_grad()
def answer(theirs: Any, prompt: list[int]) -> tuple[list[int], float]:
    """transformers' greedy tokens, and the least gap between first and second."""
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top_N2 = torch.cat(out.logits).topk(2, dim=-1).values
    gap = float((top_N2[:, 0] - top_N2[:, 1]).min())
    return out.sequences[0, len(prompt) :].tolist(), gap


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from transformers import DeepseekV3ForCausalLM

    folder = ModelFolder.find("tiny")
    model, tokenizer = folder.load_model("float32"), folder.load_tokenizer()
    assert tokenizer.vocab_size == model.config.vocab_size, "transformers may choose any id"
    export = tmp_path_factory.mktemp("tiny") / "float32"
    save(model, export, dtype="float32")
    theirs = DeepseekV3ForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tiny = Tiny(model, tokenizer, make_prompts(tokenizer), theirs=theirs)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests; more only fight over so small a model
    for prompt in tiny.prompts:
        token_ids, gap = answer(theirs, prompt)
        tiny.expected.append(token_ids)
        tiny.least_gap = min(tiny.least_gap, gap)
    torch.set_num_threads(num_threads)
    return tiny


def dequantised(weight: Tensor, scales: Tensor) -> Tensor:
    """FP8 blocks in float32, in the plainest way: every element times the scale of its block."""
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.float() * whole[: weight.shape[0], : weight.shape[1]]


def test_the_oracle_has_the_stored_weights_and_no_tie(tiny: Tiny) -> None:
    """Every stored number is in transformers' model, FP8 ones without a detour over bfloat16."""
    theirs = tiny.theirs.state_dict()
    file = ModelFolder.find("tiny").path / "model.safetensors"
    num_fp8 = 0
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
        for name in sorted(names):
            if "layers.5." in name or name.endswith("_scale_inv"):
                continue  # the MTP module has no part in transformers' answers
            value = stored.get_tensor(name)
            if f"{name}_scale_inv" in names:
                value = dequantised(value, stored.get_tensor(f"{name}_scale_inv"))
                num_fp8 += 1
            assert torch.equal(value.float(), loaded(theirs, name)), name
    assert num_fp8 > 100
    assert tiny.least_gap > LEAST_GAP
    lengths = sorted(map(len, tiny.prompts))
    assert len(lengths) == 20
    assert lengths[0] <= 5
    assert lengths[-1] >= 130
    assert len(set(map(tuple, tiny.expected))) >= 15, "too much alike"


def loaded(state: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of the checkpoint as transformers keeps it: it stacks the experts."""
    if ".experts." not in name:
        return state[name]
    before, after = name.split(".experts.")
    number, projection, _ = after.split(".")
    if projection == "down_proj":
        return state[f"{before}.experts.down_proj"][int(number)]
    halves = state[f"{before}.experts.gate_up_proj"][int(number)].chunk(2)
    return halves[projection == "up_proj"]


def run(tiny: Tiny, chosen: list[int], seed: int | None = None, **settings: Any) -> Engine:
    """Answers those prompts and compares; with a seed they arrive at random steps, in any order."""
    settings.setdefault("draft_policy", ALWAYS)
    engine = Engine(tiny.model, tiny.tokenizer, **settings)
    compare(tiny, chosen, ask(engine, tiny, chosen, seed))
    return engine


def ask(
    engine: Engine, tiny: Tiny, chosen: list[int], seed: int | None, params: SamplingParams = GREEDY
) -> list[Output]:
    prompts = [tiny.prompts[number] for number in chosen]
    if seed is None:
        return engine.generate(prompts, params)
    rng = random.Random(seed)
    order = rng.sample(range(len(chosen)), len(chosen))
    answers = {}
    while order or engine.has_work:
        while order and (not engine.has_work or rng.random() < 0.6):
            place = order.pop()
            answers[place] = engine.add(Request(prompts[place], params))
        engine.step()
    return [answers[place].output() for place in range(len(chosen))]


def compare(tiny: Tiny, chosen: list[int], outputs: list[Output]) -> None:
    for number, output in zip(chosen, outputs, strict=True):
        assert output.token_ids == tiny.expected[number], f"prompt {number}"


ALL = list(range(20))
SOME = [0, 4, 11, 16, 19]


@pytest.mark.parametrize(
    "speculate",
    [0, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3)]],
)
def test_alone(tiny: Tiny, speculate: int) -> None:
    engine = run(tiny, ALL if speculate == 0 else ALL[::2], max_batch=1, speculate=speculate)
    stats = engine.stats()
    assert len(stats.accepted) == speculate
    assert all(0 < accepted < stats.drafted[k] for k, accepted in enumerate(stats.accepted))


@pytest.mark.parametrize(
    "speculate", [0, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)], 2]
)
def test_arriving_at_random(tiny: Tiny, speculate: int) -> None:
    """With the engine's own choice of how much to draft, which changes with the clock."""
    run(
        tiny,
        ALL,
        speculate,
        draft_policy=None,
        speculate=speculate,
        max_batch=8,
        max_step_tokens=64,
    )


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("max_step_tokens", [pytest.param(1, marks=pytest.mark.slow), 7, 512])
def test_prompts_in_chunks(tiny: Tiny, max_step_tokens: int, speculate: int) -> None:
    chosen = {1: SOME, 7: ALL[::2], 512: ALL}[max_step_tokens]
    run(tiny, chosen, max_step_tokens=max_step_tokens, speculate=speculate)


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("use_prefix_cache", [False, True])
def test_asked_again(tiny: Tiny, use_prefix_cache: bool, speculate: int) -> None:
    engine = run(tiny, ALL, use_prefix_cache=use_prefix_cache, speculate=speculate)
    before = engine.stats().num_prefix_hit_tokens
    outputs = ask(engine, tiny, ALL, None)
    compare(tiny, ALL, outputs)
    hits = engine.stats().num_prefix_hit_tokens - before
    # Every whole block of a prompt but for its last token, which has to run.
    whole = sum((len(prompt) - 1) // 16 * 16 for prompt in tiny.prompts)
    assert hits == (whole if use_prefix_cache else 0)
    assert sum(output.usage.num_cached_tokens for output in outputs) == hits


@pytest.mark.parametrize("use_prefix_cache", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("speculate", [0, 3])
def test_preempted(tiny: Tiny, speculate: int, use_prefix_cache: bool) -> None:
    engine = run(
        tiny,
        ALL,
        speculate=speculate,
        use_prefix_cache=use_prefix_cache,
        cache_memory=memory_of(tiny.model, FEW_BLOCKS, min(speculate, 1)),
    )
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_blocks == stats.num_blocks == FEW_BLOCKS


@pytest.mark.parametrize("seed", [8, pytest.param(9, marks=pytest.mark.slow)])
def test_everything_at_once(tiny: Tiny, seed: int) -> None:
    """Random arrival, small chunks, drafts, the prefix cache, preemption; twice over."""
    engine = run(
        tiny,
        ALL,
        seed,
        max_step_tokens=17,
        max_batch=6,
        speculate=2,
        cache_memory=memory_of(tiny.model, FEW_BLOCKS, 1),
    )
    compare(tiny, SOME, ask(engine, tiny, SOME, seed + 10))
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hit_tokens > 0
    assert stats.accepted[0] > 0
    assert stats.num_free_blocks == stats.num_blocks


def test_answers_end_where_theirs_do(tiny: Tiny) -> None:
    """Without `ignore_eos`: the same tokens up to the first end of sentence, and no further."""
    params = replace(GREEDY, ignore_eos=False)
    engine = Engine(tiny.model, tiny.tokenizer, speculate=2, draft_policy=ALWAYS)
    outputs = ask(engine, tiny, ALL, 5, params)
    eos_id = tiny.tokenizer.eos_id
    for theirs, output in zip(tiny.expected, outputs, strict=True):
        stop = theirs.index(eos_id) + 1 if eos_id in theirs else NUM_TOKENS
        assert output.token_ids == theirs[:stop]
        assert output.finish_reason == ("stop" if eos_id in theirs else "length")
        assert output.text == tiny.tokenizer.decode([i for i in theirs[:stop] if i != eos_id])
    assert {output.finish_reason for output in outputs} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("use_prefix_cache", [False, True])
@pytest.mark.parametrize("max_step_tokens", [1, 7, 512])
@pytest.mark.parametrize("speculate", [0, 1, 2, 3])
@pytest.mark.parametrize("num_blocks", [FEW_BLOCKS, 400])
def test_all_combinations(
    tiny: Tiny, num_blocks: int, speculate: int, max_step_tokens: int, use_prefix_cache: bool
) -> None:
    chosen = SOME if max_step_tokens == 1 else ALL
    engine = run(
        tiny,
        chosen,
        speculate + 100,
        max_step_tokens=max_step_tokens,
        use_prefix_cache=use_prefix_cache,
        speculate=speculate,
        cache_memory=memory_of(tiny.model, num_blocks, min(speculate, 1)),
    )
    compare(tiny, chosen, ask(engine, tiny, chosen, speculate + 200))
    stats = engine.stats()
    # Few blocks are soon taken from the prefix cache; short steps admit few answers at a time.
    if num_blocks > FEW_BLOCKS or not use_prefix_cache:
        assert (stats.num_prefix_hit_tokens > 0) == use_prefix_cache
    if num_blocks > FEW_BLOCKS or max_step_tokens == 512:
        assert (stats.num_preemptions > 0) == (num_blocks == FEW_BLOCKS)
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_settings(tiny: Tiny, seed: int) -> None:
    rng = random.Random(seed)
    speculate = rng.randrange(4)
    run(
        tiny,
        ALL,
        seed,
        max_batch=rng.choice([2, 5, 20]),
        max_step_tokens=rng.choice([3, 17, 100]),
        block_tokens=rng.choice([1, 4, 16]),
        use_prefix_cache=rng.random() < 0.7,
        speculate=speculate,
        # The fewest still hold the longest prompt and its answer.
        cache_memory=memory_of(tiny.model, rng.choice([18, 24, 200]), min(speculate, 1)),
    )
