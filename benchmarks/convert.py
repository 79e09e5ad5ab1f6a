"""FP8 -> BF16 beside the disk: the rate of `rorqual convert` against `cp` and fsync.

A synthetic FP8 checkpoint of 2 GiB is converted; `cp` copies the same output bytes. Both end with
their bytes on the disk (fsync), both read from the page cache. Rounds are interleaved, so that a
change of the machine's pace meets both; the median of the rounds' ratios counts. Peak memory is the
converting process's own (VmHWM; ru_maxrss would inherit ours), torch included. `seconds` is the
conversion without Python's start and torch's import, `wall` the whole command.

    python benchmarks/convert.py                       # five rounds, about three minutes
    python benchmarks/convert.py --folder DIR --rounds 3 --json out.json
    python benchmarks/convert.py --to fp8              # from the BF16 result back
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD_BYTES = 1_000_000_000
# Bars: half of cp's rate at least, and this many bytes at most, however large the model.
MIN_RATIO, MAX_MEMORY = 0.5, 600e6

# The command, and its peak memory on the last line of standard error.
COMMAND = """
import atexit, pathlib, sys
def tell_peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=sys.stderr)
atexit.register(tell_peak)
from rorqual.cli.main import main
main()
"""


def config():
    """A shape of 2 GiB in FP8: a V2-Lite of four layers."""
    from rorqual.model import ModelConfig

    return ModelConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=16,
        n_routed_experts=66,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


def make_checkpoint(folder: Path) -> int:
    """Random E4M3 bytes without NaN, scales about 1e-3, ordinary BF16; returns its bytes."""
    import torch

    from rorqual.files import write_json
    from rorqual.weights.folder import shard_name
    from rorqual.weights.fp8 import E4M3, QUANTISATION
    from rorqual.weights.planned import cut_files, planned_tensors
    from rorqual.weights.safetensors_file import DTYPES, as_bytes, lay_out, write_at

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 256, (1 << 26,), generator=generator, dtype=torch.uint8)
    pool[(pool & 0x7F) == 0x7F] = 0
    shards = cut_files(planned_tensors(config(), "fp8"), SHARD_BYTES)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        layout = lay_out(shard)
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        write_at(descriptor, memoryview(layout.header), 0)
        for tensor in shard:
            num = math.prod(tensor.shape)
            if tensor.dtype == E4M3:
                values = pool.repeat(-(-num // len(pool)))[:num]
            else:
                values = (torch.rand(num, generator=generator) * 1e-3).to(DTYPES[tensor.dtype])
            write_at(descriptor, as_bytes(values), layout.offsets[tensor.name])
            weight_map[tensor.name] = name
        os.fsync(descriptor)
        os.close(descriptor)
        total += layout.num_bytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config().to_hf() | {"quantization_config": QUANTISATION})
    return total


def flush() -> None:
    os.sync()


def copy(source: Path, destination: Path) -> float:
    """Seconds of `cp -r` and fsync of every file and folder."""
    flush()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    for path in [*destination.rglob("*"), destination]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def convert(source: Path, destination: Path, to: str, workers: int | None) -> dict[str, float]:
    """Seconds, wall seconds and peak memory of the command."""
    flush()
    command = [sys.executable, "-c", COMMAND, "convert", str(source), str(destination)]
    command += ["--to", to, "--json", *(["--workers", str(workers)] if workers else [])]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the conversion failed: {done.stderr}")
    report = json.loads(done.stdout)
    peak_kilobytes = int(done.stderr.splitlines()[-1].split()[1])
    return {
        "seconds": report["seconds"],
        "wall": wall,
        "bytes": report["bytes"],
        "peak_bytes": 1024 * peak_kilobytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure [default: /tmp]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", default="bf16", choices=["bf16", "fp8", "float32"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rorqual-convert-", dir=arguments.folder))
    rows = []
    try:
        source, reference, out = folder / "fp8", folder / "reference", folder / "out"
        num_bytes = make_checkpoint(source)
        print(f"source {num_bytes / 2**30:.2f} GiB", file=sys.stderr)
        if arguments.to == "fp8":
            convert(source, folder / "bf16", "bf16", arguments.workers)
            source = folder / "bf16"
        convert(source, reference, arguments.to, arguments.workers)  # warm-up; what cp copies
        for number in range(arguments.rounds):
            cp_seconds = copy(reference, out)
            shutil.rmtree(out)
            row = convert(source, out, arguments.to, arguments.workers)
            shutil.rmtree(out)
            row |= {"cp_seconds": cp_seconds, "ratio": cp_seconds / row["seconds"]}
            row["ratio_wall"] = cp_seconds / row["wall"]
            rows.append(row)
            print(
                f"round {number + 1}: cp {row['bytes'] / cp_seconds / 1e6:,.0f} MB/s, convert "
                f"{row['bytes'] / row['seconds'] / 1e6:,.0f} MB/s ({row['seconds']:.1f} s, command "
                f"{row['wall']:.1f} s), ratio {row['ratio']:.2f}, "
                f"peak {row['peak_bytes'] / 1e6:,.0f} MB",
                file=sys.stderr,
            )
    finally:
        shutil.rmtree(folder)
    ratio = statistics.median(row["ratio"] for row in rows)
    peak = max(row["peak_bytes"] for row in rows)
    verdict = "met" if ratio >= MIN_RATIO and peak <= MAX_MEMORY else "missed"
    wall = statistics.median(row["ratio_wall"] for row in rows)
    print(
        f"median ratio {ratio:.2f} (whole command {wall:.2f}), peak {peak / 1e6:,.0f} MB: "
        f"bars of {MIN_RATIO} and {MAX_MEMORY / 1e6:,.0f} MB {verdict}"
    )
    if arguments.json:
        table = {"to": arguments.to, "ratio": ratio, "peak_bytes": peak, "rounds": rows}
        arguments.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
