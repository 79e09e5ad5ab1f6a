"""What people find in the place of weights, told by content, and what helps against each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rorqual.errors import CheckpointError, listing
from rorqual.files import stand_in

WEIGHTS = ("*.safetensors", "*.gguf")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def refuse_stand_ins(path: Path) -> None:
    """CheckpointError if weights of a folder are git-lfs pointers or web pages."""
    files = sorted(file for ending in WEIGHTS for file in path.glob(ending))
    found = {file: what for file in files if (what := stand_in(file)) is not None}
    if found:
        first, what = next(iter(found.items()))
        more = len(found) - 1
        raise CheckpointError(
            what.what,
            where=first,
            found=f"the same in {listing([file.name for file in found][1:])}" if more else None,
            fix=what.fix,
        )


def pickle_fix(files: Sequence[Path]) -> str | None:
    """What to do with PyTorch's pickles; None if the first file is no such thing."""
    if not files or not files[0].is_file():
        return None
    with files[0].open("rb") as file:
        start = file.read(len(_ZIP))
    if start != _ZIP and not start.startswith(_PICKLE):
        return None
    return (
        "convert it to safetensors: a pickle can run code, so Rorqual opens none. Where you trust "
        "it, transformers does: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
    )


def adapter_fix(path: Path) -> str | None:
    """What to do with a LoRA adapter without its model; None if this is none."""
    if not (path / "adapter_config.json").is_file():
        return None
    return (
        "this is an adapter without its model: merge the two with peft's merge_and_unload(), and "
        "save_pretrained() the result"
    )
