"""`quantization_config`: FP8 in blocks is read, other methods are refused by name.

Source: transformers' FineGrainedFP8Config, and the released config.json of DeepSeek-V3 and V3.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rorqual.errors import CheckpointError
from rorqual.model.config_keys import refuse_misspelt
from rorqual.weights.fp8 import BLOCK_PAIR
from rorqual.weights.source import Quantisation

KEY = "quantization_config"
MAX_FOUND = 200  # letters of an error: some programs have an entry here for each layer
E4M3_NAMES = (None, "e4m3", "float8_e4m3fn", "float8_e4m3")
SCALE_FORMATS = (None, "ue8m0", "float32", "float")
_READ = ("quant_method", "fmt", "weight_block_size", "scale_fmt", "activation_scheme")
_KNOWN = (*_READ, "modules_to_not_convert", "ignored_layers", "dequantize")
# Keys under which other programs note that the weights are theirs.
_ELSEWHERE = {"quantization": "mlx", "compression_config": "compressed-tensors"}

_ANY = (
    "use the model's FP8 or BF16 release, or a GGUF file of it; "
    "remove the key if the weights are BF16 after all"
)
_WITH_TRANSFORMERS = (
    "use the model's FP8 or BF16 release, or write one: load it in transformers, "
    "model.dequantize(), save_pretrained()"
)
_MENDS = {
    "bitsandbytes": _WITH_TRANSFORMERS,
    "compressed-tensors": "use the model's FP8 or BF16 release, or write one: load it in "
    "transformers with CompressedTensorsConfig(run_compressed=False), then save_pretrained()",
    "mlx": "use the model's FP8 or BF16 release, or write one with mlx_lm.convert --dequantize",
}


def quantisation_of(table: dict[str, Any], where: Path) -> Quantisation | None:
    """What a `config.json` says of its weights; CheckpointError for what we cannot decode."""
    value = table.get(KEY)
    for key, program in _ELSEWHERE.items():
        if table.get(key):
            raise _unsupported(program, f"{key} {table[key]}", where)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{KEY} is not an object",
            where=where,
            found=value,
            fix="remove the key if the weights are not FP8",
        )
    method = value.get("quant_method")
    if method is None and "bits" in value and "group_size" in value:
        method = "mlx"
    if method != "fp8":
        raise _unsupported(method, f"{KEY}.quant_method {method!r}", where)
    refuse_misspelt(value, _KNOWN, where, f"{KEY}.")
    if value.get("fmt") not in E4M3_NAMES:
        raise _unsupported("fp8", f"{KEY}.fmt {value['fmt']!r}", where)
    if value.get("scale_fmt") not in SCALE_FORMATS:
        raise _unsupported("fp8", f"{KEY}.scale_fmt {value['scale_fmt']!r}", where)
    block = value.get("weight_block_size", list(BLOCK_PAIR))
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"{KEY}.weight_block_size is not a pair of sizes",
            where=where,
            found="null, one scale for a whole tensor" if block is None else block,
            expected="[128, 128], or another block with a scale of its own",
            fix=_ANY,
        )
    return Quantisation((block[0], block[1]), value.get("scale_fmt") == "ue8m0")


def unknown_quantisation_keys(table: dict[str, Any]) -> list[str]:
    """Keys that are accepted and mean nothing here."""
    value = table.get(KEY)
    return (
        [] if not isinstance(value, dict) else [f"{KEY}.{k}" for k in sorted({*value} - {*_KNOWN})]
    )


def _unsupported(method: object, found: str, where: Path) -> CheckpointError:
    return CheckpointError(
        f"weights quantised with {method or 'an unnamed method'} in this form are not supported",
        where=where,
        found=found if len(found) <= MAX_FOUND else f"{found[:MAX_FOUND]} ...",
        expected="quant_method 'fp8' with fmt 'e4m3', or weights that are not quantised",
        fix=_MENDS.get(str(method), _ANY),
    )
