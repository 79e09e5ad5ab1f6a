"""A checkpoint's headers held against the model's shape: every fault found, none hidden."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rorqual.errors import MAX_LISTED, CheckpointError, listing
from rorqual.log import logger
from rorqual.model import ModelConfig, unknown_keys
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.runs import mend_of_checkpoint
from rorqual.weights.folder import RESTORE, refuse_absurd
from rorqual.weights.fp8 import E4M3, SCALE_DTYPES, SCALE_SUFFIX, may_be_fp8
from rorqual.weights.names import (
    IGNORED,
    StoredTensor,
    layer_of,
    layer_prefix,
    tensors_of,
)
from rorqual.weights.quantization_config import unknown_quantisation_keys
from rorqual.weights.source import Entry, TensorSource

FLOATS = ("F32", "BF16", "F16")


@dataclass
class Audit:
    """What a folder holds for its model, and its faults by kind.

    `config` is the folder's, with fewer MTP layers where the files hold none of them.
    """

    config: ModelConfig
    tensors: list[StoredTensor]
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, fault: str) -> None:
        self.faults.setdefault(kind, []).append(fault)

    @property
    def all_faults(self) -> list[str]:
        return [fault for faults in self.faults.values() for fault in faults]

    def raise_faults(self, path: Path) -> None:
        """CheckpointError that lists the faults, the first twenty by name; notes go to the log."""
        for note in self.notes:
            logger(__name__).warning("%s: %s", path, note)
        faults = self.all_faults
        if not faults:
            return
        shown = "".join(f"\n  - {fault}" for fault in faults[:MAX_LISTED])
        more = len(faults) - MAX_LISTED
        rest = f"\n  and {more} more" if more > 0 else ""
        num = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise CheckpointError(
            f"the weights cannot be used, {num}:{shown}{rest}", where=path, fix=self._mend(path)
        )

    def _mend(self, path: Path) -> str:
        if "layers" in self.faults:
            return "correct num_hidden_layers or num_nextn_predict_layers in config.json"
        if "quantisation" in self.faults:
            return (
                "config.json needs the quantization_config that the weights were published with: "
                '{"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}'
            )
        if "shapes" in self.faults:
            return "config.json belongs to another model: copy it again from the weights' source"
        if "files" in self.faults:
            return mend_of_checkpoint(path, RESTORE)
        if "dtypes" in self.faults:
            return "use the model's FP8 or BF16 release, or convert these tensors to BF16"
        if "scales" in self.faults:
            return "quantise again, or copy the weights again: their scales do not belong to them"
        return (
            "copy config.json and all weights from one source: they are of different models, "
            "or the folder was not copied whole"
        )


def audit(folder: TensorSource) -> Audit:
    """Compares every header entry with `tensors_of` the configuration."""
    config, notes = _without_absent_mtp(folder)
    refuse_absurd(config, folder.path, len(folder.entries))
    strange = unknown_keys(folder.table) + unknown_quantisation_keys(folder.table)
    if strange:
        notes.append(f"config.json has keys that mean nothing to Rorqual: {listing(strange)}")
    expected = {tensor.name: tensor for tensor in tensors_of(config)}
    present = [t for t in expected.values() if t.name in folder.entries]
    report = Audit(config, present, notes=notes)
    for fault in folder.faults:
        report.add("files", fault)
    present_layers = {layer_of(name) for name in folder.entries}
    for tensor in expected.values():
        if tensor.name in folder.entries:
            _check_tensor(folder, tensor, report)
        elif tensor.kind != "copy" and not folder.has_unreadable:
            is_whole_layer = layer_of(tensor.name) not in present_layers and not folder.faults
            kind = "layers" if is_whole_layer else "tensors"
            report.add(kind, f"missing: {tensor.name} {list(tensor.shape)}")
    for name, entry in folder.entries.items():
        if name not in expected and not _belongs_to(name, expected) and not IGNORED.search(name):
            _add_unexpected(config, entry, report)
    has_fp8 = any(entry.dtype == E4M3 for entry in folder.entries.values())
    if folder.quantisation is not None and not has_fp8 and not folder.has_unreadable:
        report.notes.append("config.json has a quantization_config, but no tensor is FP8: not used")
    return report


def _without_absent_mtp(folder: TensorSource) -> tuple[ModelConfig, list[str]]:
    """transformers keeps num_nextn_predict_layers when it writes a model without those layers."""
    config, notes = folder.config, []
    if config.num_nextn_predict_layers and not folder.faults:
        first = layer_prefix(config.num_hidden_layers)
        if not any(name.startswith(first) for name in folder.entries):
            notes.append(
                f"config.json names {config.num_nextn_predict_layers} MTP layers, the files hold "
                "none: loaded without MTP"
            )
            config = config.with_changes(num_nextn_predict_layers=0)
    return config, notes


def _check_tensor(folder: TensorSource, tensor: StoredTensor, report: Audit) -> None:
    entry = folder.entries[tensor.name]
    if entry.shape != tensor.shape:
        found, wanted = list(entry.shape), list(tensor.shape)
        report.add("shapes", f"wrong shape: {tensor.name} is {found}, expected {wanted}")
        return
    scale = folder.entries.get(tensor.scale_name)
    if entry.dtype == E4M3 and may_be_fp8(tensor.kind, tensor.shape):
        _check_scale(folder, tensor, scale, report)
        return
    kind = QUANT_TYPES.get(entry.dtype)
    if kind is not None and kind.block_values > 1:  # plain integers are safetensors' too
        report.add(
            "dtypes",
            f"type not supported: {tensor.name} has type {entry.dtype} (number {kind.type_id}) in "
            f"{entry.file}",
        )
    elif entry.dtype not in FLOATS:
        allowed = ", ".join((*FLOATS, E4M3) if may_be_fp8(tensor.kind, tensor.shape) else FLOATS)
        report.add(
            "dtypes", f"wrong dtype: {tensor.name} is {entry.dtype}, expected one of {allowed}"
        )
    if scale is not None:
        report.add("scales", f"unexpected: {scale.name} beside a weight in {entry.dtype}")
    if tensor.kind == "bias" and entry.dtype != "F32":
        report.notes.append(f"{tensor.name} is stored in {entry.dtype}: rounded before we read it")


def _check_scale(
    folder: TensorSource, tensor: StoredTensor, scale: Entry | None, report: Audit
) -> None:
    if folder.quantisation is None:
        report.add(
            "quantisation", f"{tensor.name} is FP8, but config.json has no quantization_config"
        )
        return
    wanted = tensor.scale_shape(folder.quantisation.block)
    if scale is None:
        report.add("scales", f"missing scale: {tensor.scale_name} {list(wanted)}")
    elif scale.shape != wanted:
        report.add(
            "scales",
            f"wrong shape: {scale.name} is {list(scale.shape)}, expected {list(wanted)}",
        )
    elif scale.dtype not in SCALE_DTYPES:
        allowed = ", ".join(SCALE_DTYPES)
        report.add("scales", f"wrong dtype: {scale.name} is {scale.dtype}, expected {allowed}")


def _belongs_to(name: str, expected: dict[str, StoredTensor]) -> bool:
    """A scale of a tensor we know; `_check_tensor` has looked at it."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in expected


def _add_unexpected(config: ModelConfig, entry: Entry, report: Audit) -> None:
    layer = layer_of(entry.name)
    is_beyond = layer is not None and layer >= config.num_layers_with_mtp
    report.add(
        "layers" if is_beyond else "tensors",
        f"unexpected: {entry.name} {list(entry.shape)} in {entry.file}",
    )
