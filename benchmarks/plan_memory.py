"""What `rorqual plan` says of our engine's memory, beside what a run takes.

For each case a process loads a random model and answers prompts as long as its context; its peak
resident memory after loading (which maps the file), less that of a process that has only imported
torch and rorqual, stands beside the plan's total. Models are built once, about 1 GB. In bfloat16
on a CPU oneDNN keeps compiled products, which the plan does not count but names.

    python benchmarks/plan_memory.py                     # about three minutes
    python benchmarks/plan_memory.py --folder /tmp/plan  # built there, and kept
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MAIN = "import torch, rorqual; rorqual.load, rorqual.Engine; torch.set_num_threads(1)\n"
# Not getrusage's: that begins with the memory of the process that started this one.
PEAK = """
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(lines["VmHWM"].split()[0]) * 1024)
"""
ANSWER = (
    MAIN
    + """
import json, sys
folder, options, num_tokens, num_prompts = json.loads(sys.argv[1])
engine = rorqual.Engine(folder, rorqual.load_tokenizer("tiny"), **options)
open("/proc/self/clear_refs", "w").write("5")  # the peak is what it is now
params = rorqual.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
prompts = [[5 + (i * 7 + j) % 1000 for i in range(num_tokens - 4)] for j in range(num_prompts)]
engine.generate(prompts, params)
"""
)
# (files, dtype, cache, context, streams, drafts)
CASES = [
    ("bfloat16", "bfloat16", "auto", 1024, 1, 0),
    ("bfloat16", "bfloat16", "auto", 4096, 1, 0),
    ("bfloat16", "float32", "auto", 1024, 1, 1),
    ("bfloat16", "auto", "fp8", 2048, 2, 0),
    ("fp8", "stored", "auto", 1024, 1, 0),
    ("fp8", "stored", "q8", 1024, 2, 1),
]


def config() -> Any:
    from rorqual.model import ModelConfig

    return ModelConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=16,
        n_routed_experts=32,
        num_experts_per_tok=6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=4,
        q_lora_rank=512,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=1,
        max_position_embeddings=4096,
    )


def built(folder: Path) -> Path:
    import rorqual
    from rorqual.model import build

    model = build(config())
    for form in ("bfloat16", "fp8"):
        if not (folder / form).exists():
            rorqual.save(model, str(folder / form), dtype=form)
    return folder


def peak(code: str, *arguments: str) -> int:
    command = [sys.executable, "-c", f"{code}\n{PEAK}", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def compared(case: tuple[str, str, str, int, int, int], folder: Path, bare: int) -> dict[str, Any]:
    from rorqual.plan import find_hardware, plan_inference

    files, dtype, kv, context, streams, drafts = case
    options = {
        "dtype": dtype, "kv_cache_dtype": kv, "speculate": drafts, "max_batch": streams,
        "max_model_len": context,
    }  # fmt: skip
    task = json.dumps([str(folder / files), options, context, streams])
    planned = plan_inference(
        config(), find_hardware("here"), weights={"bfloat16": "bf16"}.get(files, files), kv=kv,
        context=context, batch=streams, engine="rorqual", dtype=dtype, num_drafts=drafts,
    )  # fmt: skip
    taken, said = peak(ANSWER, task) - bare, planned.memory.as_dict()
    parts = {name: round(size / 1e6, 1) for name, size in said.items()}
    return {"case": case, "plan_mb": parts, "taken_mb": taken / 1e6, "ratio": taken / said["total"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the models are, or are built")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = built(arguments.folder or Path(temporary))
        bare = peak(MAIN)
        for case in CASES:
            print(json.dumps(compared(case, folder, bare)), flush=True)


if __name__ == "__main__":
    main()
