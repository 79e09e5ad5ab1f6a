"""What a commit computes, for `same.py`: losses, logits, tokens, written files; on one thread.

It uses the commands and the names that `import rorqual` gives, and nothing behind them.

    python benchmarks/same_outputs.py FOLDER     # FOLDER/outputs.json, and the files themselves
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "the whale swims under cold water and sings low songs to a far shore while small fish listen"
)
NUM_STEPS, SEQUENCES, LENGTH = 20, 8, 32
MODEL: dict[str, Any] = {
    "preset": "tiny",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 64,
}
CONVERSIONS = ("bf16", "fp8", "shards:2:bf16", "gguf:Q4_K_M", "gguf:Q8_0")
UNSTABLE = {"metrics.jsonl", "train.log", "environment.json", "checksums.json"}
"""Files that hold times or versions."""


def text_corpus(folder: Path) -> None:
    dice, words = random.Random(7), WORDS.split()
    lines = [" ".join(dice.choices(words, k=dice.randint(4, 40))) + "." for _ in range(1500)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    turns = []
    for question, answer in zip(lines[::2], lines[1::2], strict=True):
        roles = [("user", question), ("assistant", answer), ("user", "Why?"), ("assistant", answer)]
        turns.append(
            {"messages": [{"role": r, "content": c} for r, c in roles[: dice.choice((2, 4))]]}
        )
    (folder / "chats.jsonl").write_text("".join(json.dumps(x) + "\n" for x in turns))


def recipe(stage: str, source: str, **training: Any) -> str:
    """TOML of a run of NUM_STEPS steps, with MTP, balance, a ramp and validation."""
    tables: dict[str, dict[str, Any]] = {
        **({"model": MODEL} if stage == "pretrain" else {}),
        "tokenizer": {"folder": "tokenizer", "vocab_size": 320},
        "data": {"folder": f"tokens-{stage}", "held_out": 0.1, "seed": 5},
        "training": {
            "total_tokens": NUM_STEPS * SEQUENCES * LENGTH,
            "sequence_length": LENGTH,
            "micro_batch_size": 4,
            "threads": 1,
            **training,
        },
        "batch_ramp": {"start": SEQUENCES, "end": SEQUENCES},
        "lr_schedule": {"peak": 3e-3, "low": 3e-4, "final": 1e-4, "warmup": 0.2},
        "balance": {"bias_update_speed": 0.01, "sequence_alpha": 0.01},
        "validation": {"every_tokens": 10 * SEQUENCES * LENGTH, "max_tokens": 2000},
        "checkpoint": {"keep_last": 1},
    }
    lines = [f'name = "same-{stage}"', f'stage = "{stage}"', "seed = 4"]
    if stage != "pretrain":
        lines.append('init_from = "pretrain-float32"')
    for name, values in tables.items():
        lines += [f"[{name}]", *[f"{key} = {json.dumps(value)}" for key, value in values.items()]]
    return "\n".join([*lines, "[[data.sources]]", f'path = "{source}"', ""])


def rorqual(*arguments: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rorqual", *arguments], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"rorqual {' '.join(arguments)}: {done.stdout}{done.stderr}")


def digests(folder: Path) -> dict[str, str]:
    """The files of a folder, or the file."""
    files = sorted(file for file in [folder, *folder.rglob("*")] if file.is_file())
    return {
        str(file.relative_to(folder.parent)): hashlib.sha256(_content(file)).hexdigest()
        for file in files
        if file.name not in UNSTABLE and not file.name.startswith(".") and ".lock" not in file.name
    }


def _content(file: Path) -> bytes:
    """What is in a file, less the seconds that a run took."""
    content = file.read_bytes()
    return re.sub(rb'"seconds": [0-9.]+', b"", content) if file.name == "state.json" else content


def trained(folder: Path, stage: str, source: str, **training: Any) -> dict[str, Any]:
    name = f"{stage}-{training.get('precision', 'float32')}"
    (folder / f"{name}.toml").write_text(recipe(stage, source, **training))
    rorqual("train", f"{name}.toml", "--run", name, folder=folder)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    times = {"tokens_per_second", "seconds", "mfu", "memory", "memory_peak"}
    values = [{key: row[key] for key in row.keys() - times} for row in rows]
    losses = [row for row in values if row["kind"] == "step"]
    others = [row for row in values if row["kind"] != "step"]
    files = digests(folder / name / "checkpoints")
    return {f"{name} losses": losses, f"{name} others": others, f"{name} checkpoint": files}


def logits_of(model_folder: str) -> list[str]:
    import rorqual

    found = []
    for dtype in ("float32", "bfloat16"):
        model = rorqual.load(model_folder, dtype=dtype)
        ids = torch.arange(3 * 40).reshape(3, 40) % model.config.vocab_size
        with torch.inference_mode():
            found.append(_hex(model(ids)))
    return found


def _hex(values: torch.Tensor) -> str:
    numbers = values.float().flatten().tolist()
    return struct.pack(f"<{len(numbers)}f", *numbers).hex()


def tokens_of(folder: str) -> dict[str, Any]:
    """Greedy and seeded answers, alone and together, with drafts and batch-invariant."""
    import rorqual

    texts = ["The whale", "What is 12 + 30?", "Spell 'water'.", "Once upon a time " * 12]
    tokenizer = rorqual.load_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in texts]
    found = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "drafts": {"speculate": 2},
        "invariant": {"is_batch_invariant": True},
        "small steps": {"max_step_tokens": 16},
    }
    for name, settings in kinds.items():
        engine = rorqual.Engine(folder, dtype="float32", **settings)
        for temperature in (0.0, 1.0):
            params = rorqual.SamplingParams(
                temperature=temperature, seed=11, max_tokens=24, logprobs=2
            )
            answers = engine.generate(prompts, params)
            found[f"{name} at {temperature}"] = [
                [list(answer.token_ids), repr(answer.logprobs)] for answer in answers
            ]
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    text_corpus(folder)
    outputs: dict[str, Any] = {}
    outputs |= trained(folder, "pretrain", "text.jsonl")
    outputs |= trained(folder, "sft", "chats.jsonl")
    outputs |= trained(folder, "pretrain", "text.jsonl", precision="bfloat16")
    outputs["logits"] = [*logits_of("pretrain-float32"), *logits_of("tiny")]
    outputs["tokens"] = tokens_of("tiny")
    for form in CONVERSIONS:
        name = form.replace(":", "-") + (".gguf" if "gguf" in form else "")
        rorqual("convert", "tiny", name, "--to", form, folder=folder)
        place = folder / name
        outputs[f"tiny as {form}"] = digests(place)
    (folder / "outputs.json").write_text(json.dumps(outputs))


if __name__ == "__main__":
    main()
