"""What MTP drafts save: one stream of the bundled tiny model, greedy, one thread.

Every row answers the same prompts with the same tokens (checked); rows take turns, the best round
of each counts. `K` drafts always; `up to K` lets the engine draft as many as pay.

    python benchmarks/speculate_cpu.py
    python benchmarks/speculate_cpu.py --model DIR --rounds 5 --threads 2
"""

from __future__ import annotations

import argparse
import time

import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.draft_policy import FixedDrafts
from rorqual.weights import ModelFolder

QUESTIONS = [
    "Tell me a short story about a whale",
    "What is 347 + 586?",
    "What is the capital of Japan?",
    "Convert 3 feet to inches",
    "Who are you?",
    "Python: print the word lark backwards",
]
MAX_DRAFTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a checkpoint with an MTP module")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="at most, of each answer")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = ModelFolder.find(arguments.model)
    model, tokenizer = folder.load_model(), folder.load_tokenizer()
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS
    ]
    params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens)
    engines = {"0 drafts": Engine(model, tokenizer, use_prefix_cache=False)}
    for k in range(1, MAX_DRAFTS + 1):
        engines[f"{k} drafts"] = Engine(
            model, tokenizer, speculate=k, use_prefix_cache=False, draft_policy=FixedDrafts(k)
        )
    engines[f"up to {MAX_DRAFTS}"] = Engine(
        model, tokenizer, speculate=MAX_DRAFTS, use_prefix_cache=False
    )
    best = dict.fromkeys(engines, 0.0)
    texts: dict[str, list[str]] = {}
    for _ in range(arguments.rounds):
        for name, engine in engines.items():
            started = time.perf_counter()
            outputs = [engine.generate([prompt], params)[0] for prompt in prompts]
            seconds = time.perf_counter() - started
            best[name] = max(best[name], sum(len(o.token_ids) for o in outputs) / seconds)
            texts[name] = [output.text for output in outputs]
    assert all(found == texts["0 drafts"] for found in texts.values()), "drafts changed the text"
    for name, engine in engines.items():
        stats = engine.stats()
        shares = [
            f"{a / max(1, d):.0%}" for a, d in zip(stats.accepted, stats.drafted, strict=True)
        ]
        ratio = best[name] / best["0 drafts"]
        row = f"{name:9s} {best[name]:7.1f} tokens/s  {ratio:.2f}x"
        print(f"{row}  accepted {', '.join(shares)}" if shares else row, flush=True)


if __name__ == "__main__":
    main()
