"""Our engine, measured in a process of its own."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from typing import Any

import torch

from rorqual.bench.figures import BYTES, PERCENT, RATE, SECONDS, Figure, Load
from rorqual.bench.weights import decode_work, live_form, prefill_work
from rorqual.engine import Engine, EngineOptions, Request, SamplingParams
from rorqual.errors import TokenizerError, UsageError
from rorqual.model import ModelConfig
from rorqual.ops.memory import peak_bytes
from rorqual.ops.native.layers import take_seconds
from rorqual.tokenizer import Tokenizer, train_tokenizer
from rorqual.weights import ModelFolder

TEXTS = ("The whale swims in the sea; the sea is deep. One, two, three whales sing.",) * 4
COUNTED_STEPS = 8
FIRST_ID = 3  # below are the specials of a small vocabulary
WARM_TOKENS = 512  # before a longer prompt
NEW_ENDING = (5, 6, 7, 8)  # of a prompt whose beginning is known


def options_for(load: Load, config: ModelConfig, options: EngineOptions) -> EngineOptions:
    """With room for the streams and for no more. UsageError where the context is too short."""
    streams = [stream_tokens(load, n, d, options) + d for n in load.streams for d in load.depths]
    prompts = (*load.prefill, load.prompt_tokens)
    needed = max([*streams, *(n + len(NEW_ENDING) + 1 for n in prompts)])
    limit = options.max_positions(config.max_position_embeddings)
    if needed > limit:
        raise UsageError(
            "a stream is to be longer than the model's context",
            found=f"{needed:,} tokens, those included that are decoded while others begin",
            expected=f"at most {limit:,}",
            fix="take less with --prefill, --depth, --decode-tokens or --streams",
        )
    return replace(
        options,
        max_batch=max([1, *load.streams]),
        max_model_len=options.max_model_len or needed,
    )


def stream_tokens(load: Load, num_streams: int, depth: int, options: EngineOptions) -> int:
    """Tokens of an answer: the timed ones, and those decoded while the other streams begin."""
    beginning = num_streams * (depth // options.max_step_tokens + 2)
    return (beginning + load.decode_tokens + COUNTED_STEPS) * (1 + options.speculate)


def own_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The model's; where it has none, as random ones have, one that stands in for it."""
    try:
        return folder.load_tokenizer()
    except TokenizerError:
        return train_tokenizer(TEXTS, 300)


def prompts(num: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    size = (num, length)
    return torch.randint(FIRST_ID, vocab_size, size, generator=generator).tolist()


class Ours:
    """An engine that is measured."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self.engine, self.load, self.config = engine, load, engine.model.config
        self.form = live_form(engine.model)
        self._seeds = count()

    def first_token(self) -> float:
        """Seconds."""
        return self._seconds(self._prompts(1, self.load.prompt_tokens)[0])

    def prefill(self, num_tokens: int) -> Iterator[Figure]:
        """Of a prompt that is new; then of one that differs from it in its end alone."""
        self._seconds(self._prompts(1, min(num_tokens, WARM_TOKENS))[0])
        (prompt_ids,) = self._prompts(1, num_tokens)
        seconds = self._seconds(prompt_ids)
        step_tokens = self.engine.options.max_step_tokens
        work = prefill_work(self.config, self.form, num_tokens, step_tokens)
        yield Figure("prefill", num_tokens / seconds, RATE, num_tokens, 1, work)
        seconds = self._seconds([*prompt_ids, *NEW_ENDING])
        yield Figure("known_prefix", seconds, SECONDS, num_tokens)

    def decode(self, num_streams: int, depth: int) -> Iterator[Figure]:
        """Of steps that do nothing else; beside it the experts that some more steps visit. Then the
        share of these steps outside the C++ kernels, where they are used.
        """
        engine, options = self.engine, self.engine.options
        asked = self._prompts(num_streams, depth)
        longest = params(stream_tokens(self.load, num_streams, depth, options))
        answers = [engine.add(Request(ids, longest)) for ids in asked]
        while any(not answer.token_ids for answer in answers):
            engine.step()
        engine.step()
        first = sum(len(answer.token_ids) for answer in answers)
        take_seconds()
        began = time.perf_counter()
        for _ in range(self.load.decode_tokens):
            engine.step()
        spent = time.perf_counter() - began
        inside = sum(take_seconds().values())
        num_done = sum(len(answer.token_ids) for answer in answers) - first
        with counted_experts(engine) as counts:
            for _ in range(COUNTED_STEPS):
                engine.step()
        for answer in answers:
            engine.cancel(answer)
        work = None
        if not options.speculate:  # what drafts read is not counted
            cached = num_streams * depth + first + num_done / 2
            experts = statistics.mean(counts) if counts else None
            cache = options.kv_cache_dtype, dtype_of(engine)
            work = decode_work(self.config, self.form, num_streams, cached, cache, experts)
        yield Figure("decode", num_done / spent, RATE, depth, num_streams, work)
        if inside:
            yield Figure("outside", 100 * (1 - inside / spent), PERCENT, depth, num_streams)

    def _prompts(self, num: int, length: int) -> list[list[int]]:
        """Others each time, so that none of them begins as one before."""
        return prompts(num, length, self.config.vocab_size, next(self._seeds))

    def _seconds(self, prompt_ids: list[int]) -> float:
        """From the prompt to its answer's first token."""
        began = time.perf_counter()
        self.engine.generate([prompt_ids], params(1))
        return time.perf_counter() - began


def params(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def dtype_of(engine: Engine) -> str:
    return str(engine.model.dtype).removeprefix("torch.")


@contextmanager
def counted_experts(engine: Engine) -> Iterator[list[int]]:
    """The number of experts that each sparse layer's tokens visit, a step and layer. A model that
    otherwise runs whole runs by its parts meanwhile.
    """
    whole, engine.model.fused = engine.model.fused, None
    counts: list[int] = []
    num_sparse = sum(
        map(engine.model.config.is_moe_layer, range(engine.model.config.num_hidden_layers))
    )
    hooks = [
        router.register_forward_hook(
            lambda module, inputs, routing: counts.append(routing.experts_TK.unique().numel())
        )
        for router in engine.model.routers()[:num_sparse]
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
        engine.model.fused = whole


def measure(model: str, load: Load, options: EngineOptions, started: float) -> Iterator[Any]:
    """The form in which weights run, then the figures. `started`: when the process did, as
    `time.time` has it.
    """
    bare = peak_bytes()
    began = time.perf_counter()
    folder = ModelFolder.find(model)
    tokenizer = own_tokenizer(folder)
    options = options_for(load, folder.model_config(), options)
    engine = Engine(folder.load_model(options.dtype, "cpu"), tokenizer, options)
    loaded = time.perf_counter() - began
    ours = Ours(engine, load)
    first = ours.first_token()
    start = time.time() - started
    yield asdict(ours.form)
    yield Figure("load", loaded, SECONDS)
    yield Figure("first_token", first, SECONDS, load.prompt_tokens)
    yield Figure("start", start, SECONDS, load.prompt_tokens)
    for num_tokens in load.prefill:
        yield from ours.prefill(num_tokens)
    for depth in load.depths:
        for num_streams in load.streams:
            yield from ours.decode(num_streams, depth)
    if (peak := peak_bytes()) is not None and bare is not None:
        yield Figure("memory", peak, BYTES)
        yield Figure("own_memory", peak - bare, BYTES)


def main(asked: dict[str, Any]) -> None:
    """Prints a line of JSON for the form, and for each figure as soon as there is one."""
    load = Load.of(asked["load"])
    torch.set_num_threads(load.threads)
    for found in measure(asked["model"], load, EngineOptions(**asked["options"]), asked["started"]):
        print(json.dumps(found.as_dict() if isinstance(found, Figure) else found), flush=True)
