"""The engine's parts alone, at their limits. Oracle: each part's rule, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import ALWAYS, CONFIG

from rorqual.engine import Engine, EngineOptions, Request, SamplingParams, memory
from rorqual.engine import engine as engine_module
from rorqual.engine.cache_formats import E4M3_MAX, store
from rorqual.engine.conversation import Conversation
from rorqual.engine.draft_policy import Outcome
from rorqual.engine.sampling_state import SamplingState
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, build
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder

CPU = torch.device("cpu")

# Memory and settings


def test_the_budget_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1001)
    assert memory.budget_bytes(0.25, 5, CPU) == 250
    assert [memory.budget_bytes(None, wanted, CPU) for wanted in (499, 500, 501)] == [499, 500, 500]
    assert memory.budget_bytes(5000, 5, CPU) == 5000  # whoever asks for bytes knows


def test_a_containers_limit_is_one_among_others(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above what the machine has it limits nothing; overdrawn it leaves nothing."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\nOther: a:b\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for limit, used, free in ((90_000, 10_000, 51_200), (5000, 6000, 0), (5000, 5000, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert memory.free_bytes(CPU) == free


def checked(**changes: int) -> None:
    values = {
        "vocab_size": 10,
        "ids": 10,
        "depths": 3,
        "speculate": 0,
        "max_batch": 1,
        "max_step_tokens": 1,
        "block_tokens": 1,
    } | changes
    config: Any = SimpleNamespace(
        vocab_size=values.pop("vocab_size"),
        num_nextn_predict_layers=values.pop("depths"),
        max_position_embeddings=9,
    )
    tokenizer: Any = SimpleNamespace(vocab_size=values.pop("ids"))
    EngineOptions(**values).check(config, tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ({"ids": 10}, {"ids": 11}, "does not belong"),
        ({"max_batch": 1}, {"max_batch": 0}, "max_batch"),
        ({"max_step_tokens": 1}, {"max_step_tokens": 0}, "max_step_tokens"),
        ({"block_tokens": 1}, {"block_tokens": 0}, "block_tokens"),
        ({"max_model_len": 9}, {"max_model_len": 10}, "2 to the model's context of 9"),
        ({"max_model_len": 2}, {"max_model_len": 1}, "2 to the model's context of 9"),
        ({"speculate": 0, "depths": 0}, {"speculate": 1, "depths": 0}, "no MTP module"),
        ({"speculate": 1, "block_tokens": 3}, {"speculate": 1, "block_tokens": 2}, "too small"),
        ({"speculate": 0, "block_tokens": 2}, {"speculate": -1, "block_tokens": 3}, "0 or more"),
    ],
)
def test_settings_at_their_limits(good: dict[str, int], bad: dict[str, int], words: str) -> None:
    checked(**good)
    with pytest.raises(UsageError, match=words):
        checked(**bad)


def test_options_come_whole_by_name_or_both(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """A name beats what the whole says; what is no option is named."""
    options = EngineOptions(speculate=1, max_batch=3)
    whole = Engine(model, tokenizer, options)
    by_name = Engine(model, tokenizer, speculate=1, max_batch=3)
    both = Engine(model, tokenizer, options, max_batch=5)
    assert whole.options == by_name.options == options
    assert (both.options.speculate, both.max_batch, whole.max_batch) == (1, 5, 3)
    assert Engine(model, tokenizer).options == EngineOptions()
    with pytest.raises(TypeError, match="specualte"):
        Engine(model, tokenizer, specualte=1)
    with pytest.raises(AttributeError):
        options.speculate = 2  # type: ignore[misc]


def test_options_that_a_folder_cannot_have_are_refused_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(ModelFolder, "load_model", load)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_model_len": 10**9}, "max_model_len"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"kv_cache_dtype": "int3"}, "int3"),
    ]
    for options, words in refused:
        with pytest.raises(UsageError, match=words):
            Engine("tiny", **options)
    with pytest.raises(AssertionError, match="are read"):
        Engine("tiny", max_model_len=64)


def test_the_context_and_the_cache_that_belongs_to_it(
    model: DeepseekV3, tokenizer: Tokenizer
) -> None:
    limit = CONFIG.max_position_embeddings
    for max_model_len, is_good in ((1, False), (2, True), (limit, True), (limit + 1, False)):
        if is_good:
            engine = Engine(model, tokenizer, max_model_len=max_model_len, max_batch=1)
            assert engine.max_positions == max_model_len
        else:
            with pytest.raises(UsageError, match=f"2 to the model's context of {limit}"):
                Engine(model, tokenizer, max_model_len=max_model_len)
    engine = Engine(model, tokenizer, max_batch=3, max_model_len=33, block_tokens=8)
    assert engine.stats().num_blocks == 3 * 5
    least = Engine(model, tokenizer, max_batch=1, max_model_len=16)
    assert least.stats().num_blocks == 2  # the least there is, though one would do
    params = SamplingParams(temperature=0, max_tokens=99, ignore_eos=True)
    assert len(least.generate([[5] * 10], params)[0].token_ids) == 6


# Steps


class Noting:
    """A draft policy that wants one draft, and writes down what it is asked and told."""

    num_drafts = 1

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.told: list[tuple[list[Outcome], bool]] = []

    def begin(self, num_answers: int) -> int:
        self.asked.append(num_answers)
        return self.num_drafts

    def end(self, outcomes: Any, *, is_decode: bool) -> None:
        self.told.append((list(outcomes), is_decode))


def test_what_the_policy_and_the_counters_are_told(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """Two answers at a time; the third waits until one has ended."""
    policy = Noting()
    engine = Engine(
        model, tokenizer, speculate=2, max_batch=2, max_step_tokens=6, draft_policy=policy
    )
    prompts = ([5, 6, 7], [8] * 9, [9])
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for prompt in prompts:
        engine.add(Request(prompt, params))
    assert (engine.stats().num_waiting, engine.stats().num_running) == (3, 0)
    engine.step()  # the first prompt, and three tokens of the second
    assert (engine.stats().num_waiting, engine.stats().num_running) == (1, 2)
    assert policy.asked == [0]
    assert policy.told == [([], False)]
    engine.step()  # the first answer's next token with its draft, and four of the second prompt
    assert policy.asked == [0, 1]
    [outcome], is_decode = policy.told[1]
    assert (outcome.num_wanted, is_decode) == (1, False)
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (13, 9)
    assert stats.num_drafts == 1
    outcomes = [outcome for told, _ in policy.told for outcome in told]
    assert stats.drafted == (sum(outcome.num_wanted for outcome in outcomes), 0)
    assert stats.accepted == (sum(outcome.num_accepted for outcome in outcomes), 0)
    assert any(is_decode for _, is_decode in policy.told)
    assert (stats.num_waiting, stats.num_running) == (0, 0)


def test_no_more_drafts_than_were_allowed(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """Whatever the policy says."""
    engine = Engine(model, tokenizer, speculate=2, draft_policy=ALWAYS)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    [output] = engine.generate([[5, 6, 7]], params)
    assert len(output.usage.drafted) == 2
    assert engine.stats().num_drafts == 2


def test_drafts_that_a_grammar_takes_out_do_not_count(
    model: DeepseekV3, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves the first of two here."""
    monkeypatch.setattr(SamplingState, "prune", lambda _, drafts: list(drafts)[:1])
    engine = Engine(model, tokenizer, speculate=2, draft_policy=ALWAYS)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    [output] = engine.generate([[5, 6, 7]], params)
    stats = engine.stats()
    assert (stats.drafted[0], stats.drafted[1]) == (output.usage.drafted[0], 0)
    assert stats.drafted[0] >= 2


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("max_step_tokens", [25, 512])
@torch.no_grad()
def test_logprobs_of_a_long_prompt_come_in_parts(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    max_step_tokens: int,
) -> None:
    """Oracle: log-softmax of the whole text's logits."""
    monkeypatch.setattr(engine_module, "LOGPROB_ROWS", rows)
    engine = Engine(model, tokenizer, max_step_tokens=max_step_tokens)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [output] = engine.generate([prompts[2]], params)
    ids = torch.tensor([prompts[2]])
    table = model(ids)[0, :, : tokenizer.vocab_size].log_softmax(-1)
    first, *entries = output.prompt_logprobs or ()
    assert first is None
    assert [entry.token_id for entry in entries if entry] == prompts[2][1:]
    wanted = table[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()
    assert [entry.logprob for entry in entries if entry] == pytest.approx(wanted, abs=1e-4)


# Conversations


class Talk:
    """An engine that hears prompts of one token a character, and answers `yes`."""

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self.prompts: list[str] = []
        self.tokenizer = SimpleNamespace(
            encode_chat=lambda messages: "".join(m["content"] for m in messages),
            encode_raw=lambda text, reads_special: "^" + text,
        )

    def check_prompt(self, prompt: str) -> None:
        if len(prompt) >= self.max_positions:
            raise UsageError("does not fit")

    def stream(self, prompt: str, params: SamplingParams) -> Any:
        self.prompts.append(prompt)
        stream: Any = SimpleNamespace(text="yes")
        pieces = {"text": "yes", "usage": None, "__iter__": lambda self: iter([stream.text])}
        return type("Pieces", (), pieces)()


@pytest.mark.parametrize(
    ("max_tokens", "num_chars", "num_dropped"),
    [
        # Of 40 places an answer has 20 at most: 20 for system, two turns of 5 and the question.
        (1000, 7, 0),
        (1000, 8, 1),
        (1000, 12, 1),
        (1000, 13, 2),
        (1000, 30, 2),
        (20, 7, 0),
        (19, 8, 0),
        (19, 9, 1),
    ],
)
def test_how_many_turns_are_dropped(max_tokens: int, num_chars: int, num_dropped: int) -> None:
    engine = Talk(40)
    talk = Conversation(engine, SamplingParams(max_tokens=max_tokens), system="sys")  # type: ignore[arg-type]
    talk.turns = [("q1", "an1"), ("q2", "an2")]
    assert list(talk.ask("x" * num_chars)) == ["yes"]
    left = ["q1an1", "q2an2"][num_dropped:]
    assert engine.prompts == ["sys" + "".join(left) + "x" * num_chars]
    assert talk.num_dropped_turns == num_dropped
    assert len(talk.turns) == 3 - num_dropped
    assert talk.turns[-1] == ("x" * num_chars, "yes")
    list(talk.ask("y"))
    assert talk.num_dropped_turns <= 2
    talk.clear()
    list(talk.ask("z"))
    assert (talk.num_dropped_turns, engine.prompts[-1]) == (0, "sysz")


def test_what_never_fits_drops_nothing_and_a_raw_prompt_is_not_remembered() -> None:
    engine = Talk(40)
    talk = Conversation(engine, SamplingParams())  # type: ignore[arg-type]
    talk.turns = [("q1", "an1")]
    with pytest.raises(UsageError):
        talk.ask("x" * 40)
    assert talk.turns == [("q1", "an1")]
    list(talk.ask("x" * 39))
    assert talk.num_dropped_turns == 1
    raw = Conversation(engine, SamplingParams(), is_raw=True)  # type: ignore[arg-type]
    list(raw.ask("one"))
    list(raw.ask("two"))
    assert engine.prompts[-2:] == ["^one", "^two"]
    assert raw.turns == []


# Formats of the cache


@pytest.mark.parametrize("like", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("auto", None),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp8", torch.float8_e4m3fn),
        ("q8", torch.int8),
    ],
)
def test_what_is_stored_and_what_comes_back(
    kind: Any, stored: torch.dtype | None, like: torch.dtype
) -> None:
    layer = store(CONFIG, (2, 3), kind, torch.empty(0, dtype=like))
    assert layer.planes[0].dtype == (stored or like)
    latent = torch.randn(4, CONFIG.latent_dim).to(like)
    back = layer.decode(layer.encode(latent))
    assert (back.dtype, back.shape) == (like, latent.shape)
    assert not any(plane.float().any() for plane in layer.planes)
    rope = slice(CONFIG.kv_lora_rank, None)
    wanted = latent[:, rope] if kind in ("auto", "float32") else latent[:, rope].bfloat16().to(like)
    assert torch.equal(back[:, rope], wanted), "the rotary key is not quantised"


def test_the_largest_value_uses_the_whole_range() -> None:
    """Of each token (fp8), of each 32 values (q8), where others have a scale of their own."""
    config = CONFIG.with_changes(kv_lora_rank=40)
    latent = torch.full((2, config.latent_dim), 0.5)
    latent[0, 3], latent[0, 35], latent[1, 39] = -100.0, 8.0, -0.25
    fp8 = store(config, (1, 2), "fp8", torch.empty(0)).encode(latent)
    assert fp8[0].float().abs().amax(-1).tolist() == [E4M3_MAX, E4M3_MAX]
    assert fp8[1][:, 0].tolist() == pytest.approx([100 / E4M3_MAX, 0.5 / E4M3_MAX])
    q8 = store(config, (1, 2), "q8", torch.empty(0))
    values, scales, _ = q8.encode(latent)
    assert values[0, 3] == -127
    assert values[0, 35] == 127
    assert scales.float()[0].tolist() == pytest.approx([100 / 127, 8 / 127], rel=2**-8)
    assert scales.float()[1].tolist() == pytest.approx([0.5 / 127] * 2, rel=2**-8)


def test_a_model_without_modules_takes_no_room_for_them(tokenizer: Tokenizer) -> None:
    plain = build(CONFIG.with_changes(num_nextn_predict_layers=0))
    assert Engine(plain, tokenizer, max_batch=1).stats().drafted == ()
