"""An engine in Python, measured by itself: `python python_peer.py transformers|vllm JSON`.

It needs nothing of ours, so that it runs in a Python of the engine's own. Decoding is timed as the
time that a prompt with its answer takes longer than with the answer's first token alone.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any, Protocol

FIRST_ID, WARM_TOKENS = 3, 512


class Model(Protocol):
    """A model that answers greedily."""

    def answer(self, prompts: list[list[int]], num_new: int) -> None:
        """`num_new` tokens to each."""


class Transformers:
    """transformers' `generate`, with its grouped products where it has them."""

    def __init__(self, load: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(load["threads"])
        dtype = getattr(torch, load["dtype"])
        model: Any = AutoModelForCausalLM.from_pretrained(load["folder"], dtype=dtype)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("grouped_mm")
        self.model, self.torch = model.eval(), torch

    def answer(self, prompts: list[list[int]], num_new: int) -> None:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=False, use_cache=True,
                min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=1,
            )  # fmt: skip


class Vllm:
    """vLLM's offline engine."""

    def __init__(self, load: dict[str, Any]) -> None:
        # Unasked it computes on one core less than there are.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{load['threads'] - 1}")
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        from vllm import LLM, SamplingParams

        decoded = [depth + load["decode_tokens"] for depth in load["depths"]]
        self.params = SamplingParams
        self.llm = LLM(
            model=load["folder"],
            dtype=load["dtype"],
            skip_tokenizer_init=True,
            max_model_len=2 + max([load["prompt_tokens"], *load["prefill"], *decoded]),
            max_num_seqs=max([1, *load["streams"]]),
            enable_prefix_caching=False,
        )

    def answer(self, prompts: list[list[int]], num_new: int) -> None:
        params = self.params(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        self.llm.generate(asked, params, use_tqdm=False)


def say(what: str, value: float, unit: str, num_tokens: int = 0, num_streams: int = 0) -> None:
    figure = {"what": what, "value": value, "unit": unit}
    print(json.dumps(figure | {"num_tokens": num_tokens, "num_streams": num_streams}), flush=True)


class Clock:
    """Times answers to random prompts."""

    def __init__(self, model: Model, folder: str) -> None:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            self.ids = range(FIRST_ID, json.load(file)["vocab_size"])
        self.model = model

    def seconds(self, num_streams: int, num_prompt: int, num_new: int) -> float:
        choose = random.Random(1)
        prompts = [choose.choices(self.ids, k=num_prompt) for _ in range(num_streams)]
        began = time.perf_counter()
        self.model.answer(prompts, num_new)
        return time.perf_counter() - began


def main() -> None:
    kinds: dict[str, Any] = {"transformers": Transformers, "vllm": Vllm}
    load = json.loads(sys.argv[2])
    began = time.perf_counter()
    seconds = Clock(kinds[sys.argv[1]](load), load["folder"]).seconds
    say("load", time.perf_counter() - began, "s")
    prompt = load["prompt_tokens"]
    say("first_token", seconds(1, prompt, 1), "s", prompt)
    say("start", time.time() - load["started"], "s", prompt)
    for num_tokens in load["prefill"]:
        seconds(1, min(num_tokens, WARM_TOKENS), 1)
        rate = num_tokens / seconds(1, num_tokens, 1)
        say("prefill", rate, "tokens/s", num_tokens, 1)
    num_new = load["decode_tokens"]
    for depth in load["depths"]:
        for num_streams in load["streams"]:
            seconds(num_streams, depth, 2)
            alone = seconds(num_streams, depth, 1)
            spent = seconds(num_streams, depth, 1 + num_new) - alone
            say("decode", num_streams * num_new / spent, "tokens/s", depth, num_streams)


if __name__ == "__main__":
    main()
