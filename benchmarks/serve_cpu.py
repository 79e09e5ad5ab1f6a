"""Decoding speed on two CPU threads beside transformers, and what a shared prefix saves.

All rows run one random bf16 model of 1,765M parameters, 363M of them active (`mid`: hidden 1024,
16 layers, 64 experts top-6), which the benchmark builds and saves once. Each row runs in a process
of its own, one after the other; the best of `--rounds` counts. A figure's share of the limit is the
bytes that a step must read (active weights, of experts those that were really routed to, and the
latents) over the two-thread read rate measured in the same run.

    python benchmarks/serve_cpu.py                    # the whole table, about ten minutes, 10 GB
    python benchmarks/serve_cpu.py --quick            # one round, few tokens
    python benchmarks/serve_cpu.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
PROMPT_TOKENS, PREFIX_TOKENS, PREFILL_TOKENS = 32, 2000, 512
ROWS = [
    "limit",
    "transformers 1",
    "rorqual 1",
    "transformers 8",
    "rorqual 8",
    "rorqual prefill",
    "rorqual prefix",
]
TEXTS = ["The whale swims in the sea; the sea is deep. One, two, three whales sing."] * 4


def config() -> Any:
    from rorqual.model import ModelConfig

    return ModelConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
        initializer_range=0.02,
    )


def build_model(folder: Path) -> None:
    import rorqual
    from rorqual.model import build

    rorqual.save(build(config()).to(dtype=_bf16()), str(folder), dtype="bfloat16")


def _bf16() -> Any:
    import torch

    return torch.bfloat16


def prompts(num: int, length: int, vocab_size: int = 250) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist() for _ in range(num)
    ]


def read_rate() -> dict[str, float]:
    """Bytes a second of summing a gigabyte with two threads, best of five."""
    import torch

    data = torch.ones(1 << 28, dtype=torch.float32)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return {"bytes_per_second": data.numel() * 4 / min(seconds[1:])}


def transformers_decode(folder: Path, num_streams: int, num_tokens: int) -> dict[str, float]:
    import torch
    from transformers import DeepseekV3ForCausalLM

    start = time.perf_counter()
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    load_seconds = time.perf_counter() - start
    model.set_experts_implementation("grouped_mm")
    ids = torch.tensor(prompts(num_streams, PROMPT_TOKENS))

    def seconds(num_new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=1,
            )  # fmt: skip
        return time.perf_counter() - start

    seconds(2)
    spent = seconds(1 + num_tokens) - seconds(1)
    return {"tokens_per_second": num_streams * num_tokens / spent, "load_seconds": load_seconds}


def engine(folder: Path, **settings: Any) -> Any:
    from rorqual.engine import Engine
    from rorqual.tokenizer import train_tokenizer
    from rorqual.weights import load

    return Engine(load(folder, "bfloat16"), train_tokenizer(TEXTS, 300), **settings)


def params(num_tokens: int) -> Any:
    from rorqual.engine import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def rorqual_decode(folder: Path, num_streams: int, num_tokens: int) -> dict[str, float]:
    """Tokens a second of decode steps alone, and the bytes that one of them reads."""
    from rorqual.engine import Request

    start = time.perf_counter()
    ours = engine(folder, use_prefix_cache=False)
    load_seconds = time.perf_counter() - start
    ours.generate(prompts(num_streams, PROMPT_TOKENS), params(2))
    for prompt_ids in prompts(num_streams, PROMPT_TOKENS):
        ours.add(Request(prompt_ids, params(2 * num_tokens)))
    while sum(len(answer.token_ids) for answer in list(ours._sequences)) < num_streams:
        ours.step()
    ours.step()
    start = time.perf_counter()
    num_done = sum(len(piece.token_ids) for _ in range(num_tokens) for _, piece in ours.step())
    spent = time.perf_counter() - start
    step_bytes = _step_bytes(ours, PROMPT_TOKENS + num_tokens)
    return {
        "tokens_per_second": num_done / spent,
        "steps_per_second": num_tokens / spent,
        "step_bytes": step_bytes,
        "load_seconds": load_seconds,
    }


def _step_bytes(ours: Any, num_cached: int) -> float:
    """Weights that the next few steps read, experts counted as they are routed, and the cache."""
    model, size = ours.model, 2
    counts: list[int] = []
    hooks = [
        router.register_forward_hook(
            lambda module, inputs, routing: counts.append(routing.experts_TK.unique().numel())
        )
        for router in model.routers()
    ]
    num_steps = 8
    for _ in range(num_steps):
        ours.step()
    for hook in hooks:
        hook.remove()
    experts = [module for module in model.modules() if type(module).__name__ == "Experts"]
    one_expert = sum(p[0].numel() for p in experts[0].parameters())
    routed = sum(p.numel() for module in experts for p in module.parameters())
    fixed = sum(p.numel() for p in model.parameters()) - routed
    fixed -= model.model.embed_tokens.weight.numel()  # a row a token
    latents = num_cached * model.config.latent_dim * model.config.num_hidden_layers
    num_streams = max(1, ours.stats().num_running)
    return size * (fixed + one_expert * sum(counts) / num_steps + latents * num_streams)


def rorqual_prefill(folder: Path) -> dict[str, float]:
    ours = engine(folder, use_prefix_cache=False)
    ours.generate(prompts(1, 128), params(1))
    start = time.perf_counter()
    ours.generate(prompts(1, PREFILL_TOKENS), params(1))
    return {"tokens_per_second": PREFILL_TOKENS / (time.perf_counter() - start)}


def rorqual_prefix(folder: Path) -> dict[str, float]:
    """Seconds to the first token of a prompt whose beginning is new, and then known."""
    ours = engine(folder)
    for ending in ([5, 6, 7, 8], [8, 7, 6, 5]):  # kernels for these lengths are compiled once
        ours.generate([prompts(1, 64, 200)[0] + ending], params(1))
    prefix = prompts(1, PREFIX_TOKENS)[0]
    seconds = []
    for ending in ([5, 6, 7, 8], [8, 7, 6, 5]):
        start = time.perf_counter()
        ours.generate([prefix + ending], params(1))
        seconds.append(time.perf_counter() - start)
    return {"first_seconds": seconds[0], "second_seconds": seconds[1]}


def measure(row: str, folder: Path, num_tokens: int) -> dict[str, float]:
    """Runs one row in this process."""
    import torch

    torch.set_num_threads(THREADS)
    side, _, what = row.partition(" ")
    if row == "build":
        build_model(folder)
        return {}
    if row == "limit":
        return read_rate()
    if side == "transformers":
        result = transformers_decode(folder, int(what), num_tokens)
    elif what == "prefill":
        result = rorqual_prefill(folder)
    elif what == "prefix":
        result = rorqual_prefix(folder)
    else:
        result = rorqual_decode(folder, int(what), num_tokens)
    return result | {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run_row(row: str, folder: Path, num_tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--row", row, "--folder", str(folder)]
    command += ["--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def better(row: str, first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    if row == "rorqual prefix":
        return min(first, second, key=lambda r: r["second_seconds"] / r["first_seconds"])
    name = "bytes_per_second" if row == "limit" else "tokens_per_second"
    return max(first, second, key=lambda r: r[name])


def table(results: dict[str, dict[str, float]]) -> str:
    rate = results["limit"]["bytes_per_second"]
    ours_1, ours_8 = results["rorqual 1"], results["rorqual 8"]
    step_bytes = {"1": ours_1["step_bytes"], "8": ours_8["step_bytes"]}
    lines = [
        f"read rate, {THREADS} threads: {rate / 1e9:.1f} GB/s",
        "",
        "| row | tokens/s | share of the bandwidth limit | peak memory GB | load s |",
        "|---|---|---|---|---|",
    ]
    for row in ("transformers 1", "rorqual 1", "transformers 8", "rorqual 8"):
        result, num = results[row], row.split()[1]
        share = result["tokens_per_second"] / int(num) * step_bytes[num] / rate
        lines.append(
            f"| {row.replace(' ', ', ')} stream{'s' if num != '1' else ''} "
            f"| {result['tokens_per_second']:.2f} | {share:.0%} | {result['peak_rss_gb']:.1f} "
            f"| {result['load_seconds']:.1f} |"
        )
    prefix = results["rorqual prefix"]
    prefill = results["rorqual prefill"]["tokens_per_second"]
    single = ours_1["tokens_per_second"] / results["transformers 1"]["tokens_per_second"]
    many = ours_8["tokens_per_second"] / ours_1["tokens_per_second"]
    peer = ours_8["tokens_per_second"] / results["transformers 8"]["tokens_per_second"]
    reuse = prefix["second_seconds"] / prefix["first_seconds"]
    lines += [
        "",
        f"prefill of {PREFILL_TOKENS}: {prefill:.0f} tokens/s",
        f"one stream against transformers: {single:.2f}x (bar 3)",
        f"8 streams against one: {many:.2f}x (bar 2)",
        f"8 streams against transformers' 8: {peer:.2f}x (bar 1.5)",
        f"first token of a {PREFIX_TOKENS}-token prefix: {prefix['first_seconds']:.2f} s new, "
        f"{prefix['second_seconds']:.3f} s known: {reuse:.1%} (bar 10 %)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of eight tokens")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="timed decode steps")
    parser.add_argument("--folder", type=Path, help="keep the model here and find it again")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.folder, arguments.tokens)))
        return
    rounds, num_tokens = (1, 8) if arguments.quick else (arguments.rounds, arguments.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "mid"
        if not (folder / "config.json").exists():
            print("building the model", file=sys.stderr)
            run_row("build", folder, 0)
        results: dict[str, dict[str, float]] = {}
        for _ in range(rounds):
            for row in ROWS:
                result = run_row(row, folder, num_tokens)
                results[row] = better(row, results.get(row, result), result)
                print(f"{row}: {result}", file=sys.stderr)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
