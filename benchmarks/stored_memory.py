"""The memory of `generate --dtype stored`, with a GGUF file of 1 GB and FP8 of 2 GB.

Peak resident memory, less that of a process that has only imported torch and rorqual, must be at
most 1.1 times the file and the cache, and 64 MB: at the first start, which packs and keeps the
weights, and at the next, which maps what was kept. The random model of `preset:mid` (1,765M
parameters) is built and converted once: some minutes, 7 GB.

    python benchmarks/stored_memory.py --folder /tmp/mid     # built there, and kept
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SPARE_BYTES, FACTOR = 64 * 2**20, 1.1
BARE = "import torch, rorqual; rorqual.load, rorqual.Engine"
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
GENERATE = """
import json, sys, torch, rorqual
torch.set_num_threads(2)
tokenizer = rorqual.load_tokenizer("tiny")
engine = rorqual.Engine(sys.argv[1], tokenizer, dtype="stored", max_batch=1, max_model_len=256)
params = rorqual.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
engine.generate([[5, 9, 2, 7]], params)
print(engine._cache.num_bytes)
"""


def run(code: str, *arguments: str, cache: Path) -> list[int]:
    command = [sys.executable, "-c", code + PEAK, *arguments]
    environment = {**os.environ, "RORQUAL_CACHE": str(cache)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [int(line) for line in done.stdout.split()]


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def built(folder: Path) -> dict[str, Path]:
    from rorqual.bench.models import build_random
    from rorqual.model import preset

    source = folder / "mid"
    if not (source / "config.json").exists():
        build_random(preset("mid"), source)
    found = {"gguf:Q4_K_M": folder / "mid.gguf", "fp8": folder / "mid-fp8"}
    for form, path in found.items():
        if not path.exists():
            command = [sys.executable, "-m", "rorqual", "convert", str(source), str(path)]
            subprocess.run([*command, "--to", form], check=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the models are, or are built")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results: dict[str, Any] = {}
        weights = Path(temporary) / "cache"
        (bare,) = run(BARE + "\n", cache=weights)
        for form, path in built(arguments.folder or Path(temporary)).items():
            for start in ("first start", "next start"):
                cache, peak = run(GENERATE, str(path), cache=weights)
                limit = FACTOR * (size_of(path) + cache) + SPARE_BYTES
                results[f"{form}, {start}"] = {
                    "file_mb": size_of(path) / 2**20,
                    "peak_less_bare_mb": (peak - bare) / 2**20,
                    "limit_mb": limit / 2**20,
                    "is_met": peak - bare <= limit,
                }
    print(json.dumps(results, indent=2))
    raise SystemExit(0 if all(result["is_met"] for result in results.values()) else 1)


if __name__ == "__main__":
    main()
