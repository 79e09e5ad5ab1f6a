"""vLLM, measured by itself: `python vllm_peer.py JSON`, in a Python that has it. Needs nothing of
ours.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

FIRST_ID, WARM_TOKENS = 3, 512


def say(what: str, value: float, unit: str, num_tokens: int = 0, num_streams: int = 0) -> None:
    figure = {"what": what, "value": value, "unit": unit}
    print(json.dumps(figure | {"num_tokens": num_tokens, "num_streams": num_streams}), flush=True)


class Model:
    """vLLM's offline engine, greedy."""

    def __init__(self, load: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        longest = max([0, *load["depths"]]) + load["decode_tokens"] + 2
        longest = max(longest, 2 + max([load["prompt_tokens"], *load["prefill"]]))
        self.params = SamplingParams
        self.llm = LLM(
            model=load["folder"],
            dtype=load["dtype"],
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=max([1, *load["streams"]]),
            enable_prefix_caching=False,
        )
        self.vocab_size = self.llm.llm_engine.model_config.get_vocab_size()

    def seconds(self, num_streams: int, num_prompt: int, num_new: int) -> float:
        """Of `num_new` tokens after random prompts."""
        choose = random.Random(1)
        prompts = [
            {
                "prompt_token_ids": [
                    choose.randrange(FIRST_ID, self.vocab_size) for _ in range(num_prompt)
                ]
            }
            for _ in range(num_streams)
        ]
        params = self.params(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began


def main() -> None:
    load = json.loads(sys.argv[1])
    # Unasked it computes on one core less than there are.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{load['threads'] - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    began = time.perf_counter()
    model = Model(load)
    say("load", time.perf_counter() - began, "s")
    prompt = load["prompt_tokens"]
    say("first_token", model.seconds(1, prompt, 1), "s", prompt)
    say("start", time.time() - load["started"], "s", prompt)
    for num_tokens in load["prefill"]:
        model.seconds(1, min(num_tokens, WARM_TOKENS), 1)
        rate = num_tokens / model.seconds(1, num_tokens, 1)
        say("prefill", rate, "tokens/s", num_tokens, 1)
    for depth in load["depths"]:
        for num_streams in load["streams"]:
            model.seconds(num_streams, depth, 2)
            num_new = load["decode_tokens"]
            alone = model.seconds(num_streams, depth, 1)
            spent = model.seconds(num_streams, depth, 1 + num_new) - alone
            say("decode", num_streams * num_new / spent, "tokens/s", depth, num_streams)


if __name__ == "__main__":
    main()
