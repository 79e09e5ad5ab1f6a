"""transformers, measured by itself: `python transformers_peer.py JSON`. Needs nothing of ours."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

FIRST_ID, WARM_TOKENS = 3, 512


def say(what: str, value: float, unit: str, num_tokens: int = 0, num_streams: int = 0) -> None:
    figure = {"what": what, "value": value, "unit": unit}
    print(json.dumps(figure | {"num_tokens": num_tokens, "num_streams": num_streams}), flush=True)


class Model:
    """A causal language model, greedy."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("grouped_mm")

    def seconds(self, num_streams: int, num_prompt: int, num_new: int) -> float:
        """Of `num_new` tokens after random prompts."""
        torch = self.torch
        generator = torch.Generator().manual_seed(1)
        size, vocab_size = (num_streams, num_prompt), self.model.config.vocab_size
        ids = torch.randint(FIRST_ID, vocab_size, size, generator=generator)
        began = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=1,
            )  # fmt: skip
        return time.perf_counter() - began


def main() -> None:
    load = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(load["threads"])
    began = time.perf_counter()
    model = Model(load["folder"], load["dtype"])
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
