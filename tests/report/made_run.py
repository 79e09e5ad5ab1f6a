"""A run's folder that no run made: metrics by formulas, so that a test knows what it must see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RECIPE = """\
name = "made"
stage = "pretrain"
seed = 3

[training]
total_tokens = 4096000
sequence_length = 64
"""
TIMELINE = {
    "order": "1f1b",
    "timeline": [
        [
            {"action": "0F0", "start": 10.0, "end": 11.0},
            {"action": "0B0", "start": 13.0, "end": 15.0},
        ],
        [
            {"action": "1F0", "start": 11.0, "end": 12.0},
            {"action": "(1F1;1B0)OVERLAP_F_B", "start": 12.0, "end": 13.0},
        ],
    ],
}


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "tokens": 1024 * step,
        "loss": 9.0 / math.sqrt(step) + 2,
        "main": 7.0 / math.sqrt(step) + 1.5,
        "mtp": [7.0 / math.sqrt(step) + 1.6],
        "balance": 1e-4,
        "lr": 1e-3 * min(1.0, step / 10),
        "mtp_weight": 0.3,
        "grad_norm": 2.0 / step + 0.5,
        "batch": 16,
        "targets": 1024,
        "tokens_per_second": 2000.0 + step % 7,
        "mfu": 0.31,
        "memory": 900_000_000 + step,
        "memory_peak": 1_200_000_000,
        "seconds": {"data": 0.01, "forward": 0.15, "backward": 0.3, "optimizer": 0.04},
        "max_vio_mean": 0.5,
        "max_vio_max": 1.0,
        **changes,
    }


def load_record(step: int) -> dict[str, Any]:
    """Two layers of four experts, of which the first gets more and more."""
    more = min(step / 100, 1.0)
    row = [1 + more, 1 - more / 3, 1 - more / 3, 1 - more / 3]
    return {"kind": "load", "step": step, "layers": [1, 2], "load": [row, row[::-1]]}


def records(num_steps: int) -> list[dict[str, Any]]:
    found = []
    for step in range(1, num_steps + 1):
        found.append(step_record(step))
        if step % 20 == 0:
            found.append(load_record(step))
            bits = 4 / math.sqrt(step) + 1
            held_out = {"bits_per_byte": bits, "nats_per_token": 3 * bits, "num_bytes": 5000}
            tokens = 1024 * step
            found.append({"kind": "validation", "step": step, "tokens": tokens, **held_out})
    return found


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    *,
    recipe: str | None = RECIPE,
    timeline: object = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if recipe is not None:
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    if timeline is not None:
        (folder / "timeline.json").write_text(json.dumps(timeline), encoding="utf-8")
    return folder
