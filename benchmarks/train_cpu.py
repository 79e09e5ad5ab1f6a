"""Training speed on one CPU thread beside transformers at its best: tokens a second and memory.

Both sides train the same DeepSeek-V3-shaped model of 14M parameters (hidden 256, 6 layers, 16
experts top-4, vocabulary 8192) on the same batches of 8 x 256 random tokens with next-token cross
entropy and fused AdamW. Each row runs in a process of its own; rounds are interleaved, so that a
change of the machine's pace meets every row; the best round of each row counts. (transformers'
`batched_mm` experts are left out: 20 tokens a second and 17 GB.) MTP's cost is a row of its own,
for transformers cannot train it.

    python benchmarks/train_cpu.py                 # the whole table, about fifteen minutes
    python benchmarks/train_cpu.py --quick         # one round, few steps
    python benchmarks/train_cpu.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCH, LENGTH = 8, 256
WARM_UP_STEPS = 2
PEER_ROWS = [
    "transformers float32 eager-attention eager-experts",
    "transformers float32 eager-attention grouped_mm",
    "transformers float32 sdpa grouped_mm",
    "transformers bfloat16 eager-attention grouped_mm",
    "transformers bfloat16 sdpa grouped_mm",
    "transformers float32 eager-attention grouped_mm compiled",
    "transformers float32 sdpa grouped_mm compiled",
    "transformers bfloat16 eager-attention grouped_mm compiled",
    "transformers bfloat16 sdpa grouped_mm compiled",
]
OUR_ROWS = [
    "rorqual float32 eager",
    "rorqual float32 compiled",
    "rorqual bfloat16 eager",
    "rorqual bfloat16 compiled",
    "rorqual float32 eager mtp",
    "rorqual float32 compiled mtp",
    "rorqual bfloat16 eager mtp",
    "rorqual bfloat16 compiled mtp",
]


def config(num_mtp: int):
    from rorqual.model import ModelConfig

    return ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_nextn_predict_layers=num_mtp,
        initializer_range=0.02,
    )


def our_loss(row: str):
    import torch

    from rorqual.model import build
    from rorqual.train.loss import TrainingModel, coefficients, target_counts
    from rorqual.train.precision import compute_in

    num_depths = 1 if "mtp" in row else 0
    model = build(config(num_depths)).train()
    mask = torch.ones(BATCH, LENGTH + 1 + num_depths, dtype=torch.bool)
    by = coefficients(target_counts(mask, num_depths), BATCH, mtp_weight=0.3, balance_alpha=1e-4)

    precision = "bfloat16" if "bfloat16" in row else "float32"

    compute_in(model, precision)
    root = TrainingModel(model)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        tokens = batch[:, : LENGTH + 1 + num_depths]
        return root(tokens_BS=tokens, mask_BS=mask, by=by).total

    return model, torch.compile(loss) if "compiled" in row else loss


def their_loss(row: str):
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    attention = "sdpa" if "sdpa" in row else "eager"
    model = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**config(0).to_hf()), attn_implementation=attention
    ).train()
    if "grouped_mm" in row:
        model.set_experts_implementation("grouped_mm")
    use_bf16 = "bfloat16" in row

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            ids = batch[:, :LENGTH]
            logits = model(ids, use_cache=False).logits
        targets = batch[:, 1 : LENGTH + 1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return model, torch.compile(loss) if "compiled" in row else loss


def measure(row: str, num_steps: int) -> dict[str, float]:
    """Runs one row in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, loss = (our_loss if row.startswith("rorqual") else their_loss)(row)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = torch.randint(0, 8192, (WARM_UP_STEPS + num_steps, BATCH, LENGTH + 2))
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[WARM_UP_STEPS:])
    return {
        "tokens_per_second": BATCH * LENGTH / timed[len(timed) // 2],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters_millions": sum(p.numel() for p in model.parameters()) / 1e6,
        "warm_up_seconds": seconds[0],
    }


def run_row(row: str, num_steps: int) -> dict[str, float] | None:
    """Runs one row in a process of its own; None if that setting does not run here."""
    command = [sys.executable, __file__, "--row", row, "--steps", str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{row}: does not run here: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: dict[str, dict[str, float]]) -> str:
    peers = [row for row in results if row.startswith("transformers")]
    best = max(peers, key=lambda row: results[row]["tokens_per_second"])
    base = results[best]
    lines = [
        "| row | tokens/s | ratio to the best peer | peak memory MB |",
        "|---|---|---|---|",
    ]
    for row, result in sorted(results.items(), key=lambda item: item[1]["tokens_per_second"]):
        speed, memory = result["tokens_per_second"], result["peak_rss_mb"]
        mark = " (best peer)" if row == best else ""
        ratio = speed / base["tokens_per_second"]
        lines.append(f"| {row}{mark} | {speed:.0f} | {ratio:.2f} | {memory:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of three steps")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a row and round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.steps)))
        return
    rounds, steps = (1, 3) if arguments.quick else (arguments.rounds, arguments.steps)
    results: dict[str, dict[str, float]] = {}
    rows: list[str] = [*PEER_ROWS, *OUR_ROWS]
    better: Callable[[dict[str, float]], float] = lambda r: r["tokens_per_second"]  # noqa: E731
    for _ in range(rounds):
        for row in list(rows):
            result = run_row(row, steps)
            if result is None:
                rows.remove(row)
                continue
            results[row] = max([result, *([results[row]] if row in results else [])], key=better)
            print(f"{row}: {result['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
