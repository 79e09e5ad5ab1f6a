"""What choosing a token costs at V3's vocabulary on one thread, and beside a full sort.

    python benchmarks/sampler_cpu.py [--rows 8] [--rounds 30]

The logits are random with a few likely tokens, as a trained model's are; `flat` has none, so that
top-p must look at many. The last lines are the grammar's: building the token trie once, compiling a
schema, and a mask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.grammar import Grammar, GrammarCompiler
from rorqual.engine.params import SamplingParams
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import verify
from rorqual.tokenizer import Tokenizer, deepseek_v3

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "top_p 0.95, flat": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "all penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "top_p 0.95, penalties": {
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
    },
    "logprobs 20": {"logprobs": 20},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["sea", "land"]}},
        "size": {"type": "number"},
    },
    "required": ["name", "tags", "size"],
}


def microseconds(work: Callable[[], object], num_rounds: int) -> float:
    """Processor time, median of the rounds: other programs on the machine do not count."""
    times = []
    for _ in range(num_rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e6 * statistics.median(times)


def by_sorting(logits_NV: Tensor) -> Tensor:
    """top_p over a sort of everything: what most samplers do."""
    probs_NV, ids_NV = logits_NV.softmax(-1).sort(descending=True)
    before_NV = F.pad(probs_NV.cumsum(-1)[:, :-1], (1, 0))
    probs_NV[before_NV >= 0.95] = 0
    return ids_NV.gather(-1, probs_NV.multinomial(1))


def sampling(tokenizer: Tokenizer, num_rows: int, num_rounds: int) -> None:
    flat_NV = torch.randn(num_rows, 129_280)
    logits_NV = flat_NV.clone()
    logits_NV[:, :30] += 12
    for name, settings in SETTINGS.items():
        params = SamplingParams(**{"temperature": 1.0, "ignore_eos": True} | settings)
        states = [SamplingState(params, range(1000), tokenizer) for _ in range(num_rows)]
        rows_NV = flat_NV if "flat" in name else logits_NV
        took = microseconds(lambda r=rows_NV, s=states: verify(r, [[]] * num_rows, s), num_rounds)
        print(f"{name:22} {took / num_rows:8.0f} us a row")
    took = microseconds(lambda: by_sorting(logits_NV), num_rounds)
    print(f"{'(full sort, top_p)':22} {took / num_rows:8.0f} us a row")


def grammar(tokenizer: Tokenizer, num_rounds: int) -> None:
    compiler = GrammarCompiler(tokenizer)
    took = microseconds(lambda: compiler.compile(Grammar("json_object")), 1)
    print(f"{'grammar: trie':22} {took / 1000:8.0f} ms once")
    schema = Grammar("json_schema", json.dumps(SCHEMA))
    took = microseconds(lambda: compiler.compile(schema), 1)
    print(f"{'grammar: schema':22} {took:8.0f} us")
    took = microseconds(lambda: compiler.compile(schema), num_rounds)
    print(f"{'grammar: again':22} {took:8.0f} us")
    matcher = compiler.compile(schema).matcher()
    for text in ('{"name":"', "a whale", '","tags":["'):
        for token_id in tokenizer.encode(text):
            matcher.put(token_id)
        took = microseconds(matcher.allowed, num_rounds)
        print(f"{'grammar: mask':22} {took:8.0f} us after {text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = deepseek_v3()
    print(f"One thread, {arguments.rows} rows of 129,280 logits")
    with torch.inference_mode():
        sampling(tokenizer, arguments.rows, arguments.rounds)
    grammar(tokenizer, arguments.rounds)


if __name__ == "__main__":
    main()
