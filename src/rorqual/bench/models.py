"""Models that are made to be measured: random weights of a shape, and a GGUF file of a folder.

Each is made in a process of its own, whose memory goes with it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from rorqual.bench.processes import child, run
from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.model.flops import count_parameters

SPARE_BYTES = 1 << 30


def build_random(config: ModelConfig, folder: Path) -> None:
    """A Hugging Face folder of that shape, in bfloat16, without a tokenizer. UsageError where the
    disk has no room for it.
    """
    _check_room(
        2 * count_parameters(config).mtp_repeated + 2 * count_parameters(config).total, folder
    )
    run("the random model", child("build", config=config.to_hf(), folder=str(folder)))


def convert_to_gguf(folder: Path, file: Path) -> None:
    """A BF16 file of the folder's weights."""
    _check_room(sum(f.stat().st_size for f in folder.glob("*.safetensors")), file.parent)
    command = [sys.executable, "-m", "rorqual", "convert", str(folder), str(file)]
    run("the conversion to GGUF", [*command, "--to", "gguf:BF16"])


def _check_room(num_bytes: float, place: Path) -> None:
    parent = next(p for p in (place, *place.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if num_bytes + SPARE_BYTES > free:
        raise UsageError(
            "the disk has no room for the model that is to be made",
            where=parent,
            found=f"{free / 1e9:.1f} GB free",
            expected=f"{(num_bytes + SPARE_BYTES) / 1e9:.1f} GB",
            fix="free some space, set TMPDIR to another disk, or take a smaller model",
        )


def main(asked: dict[str, Any]) -> None:
    """Builds and saves what is asked for."""
    import torch

    from rorqual.model import build
    from rorqual.weights import save

    config = ModelConfig.from_hf(asked["config"])
    save(build(config).to(dtype=torch.bfloat16), asked["folder"], dtype="bfloat16")
