"""Reads a checkpoint of any kind into a model: a tensor at a time, dequantised on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from rorqual.bundled import checkpoint_path
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, empty
from rorqual.model.served import use_kernels
from rorqual.ops.device import resolve_device
from rorqual.ops.kernels import AUTO
from rorqual.weights.advice import advice_files
from rorqual.weights.audit import audit
from rorqual.weights.copies import say_it_differs
from rorqual.weights.forms import FORMS
from rorqual.weights.names import StoredTensor
from rorqual.weights.open import open_source
from rorqual.weights.progress import track
from rorqual.weights.source import TensorSource
from rorqual.weights.stored_reader import load_stored
from rorqual.weights.values import read_values

LoadDtype = Literal["float32", "bfloat16", "stored", "native", "int8"]


def load(
    path: str | os.PathLike[str],
    dtype: LoadDtype = "float32",
    device: str | torch.device = "cpu",
    kernels: str = AUTO,
) -> DeepseekV3:
    """The model in a checkpoint, every parameter in `dtype` but the float32 router bias.

    "stored": matrices stay in the bytes of their file, FP8 and GGUF's types included; the rest and
    what goes from layer to layer is float32. On the CPU, frozen. The C++ kernels multiply BF16,
    Q8_0, Q4_K and Q6_K; all else is decoded a tile at a time for each product, slow. "native": what
    they do not multiply becomes bfloat16 at loading. "int8": that and BF16 become Q8_0, an int8
    with a scale for 32 values. `kernels` as of `use_kernels`.

    A Hugging Face folder, a folder of the demo's rank shards, or GGUF: its content decides. The
    text `tiny` is the bundled model.
    `device` is auto (a GPU where torch sees one), cpu, cuda or cuda:N.

    CheckpointError lists all that is missing, unexpected, repeated, misshapen, of a wrong dtype or
    unreadable, before any weight is read; ConfigError for a configuration that is not ours, or a
    `generation_config.json` or `chat.json` that cannot be read.
    """
    if dtype not in get_args(LoadDtype):
        raise UsageError(
            f"a model cannot be loaded as {dtype!r}",
            expected=" or ".join(get_args(LoadDtype)),
            fix="FP8 checkpoints are dequantised on loading, or run as they are stored",
        )
    device = resolve_device(device)
    with open_source(checkpoint_path(path)) as opened:
        advice = advice_files(opened)  # a broken one is told before minutes of loading
        model = load_from(opened, dtype, device, kernels)
        model.advice = advice
    return model


def load_from(
    source: TensorSource,
    dtype: LoadDtype = "float32",
    device: str | torch.device = "cpu",
    kernels: str = AUTO,
) -> DeepseekV3:
    """The model in an opened checkpoint; see `load`."""
    device = resolve_device(device)
    if dtype in FORMS:
        model = load_stored(source, FORMS[dtype], device, kernels)
    else:
        model = _load(source, dtype, device)
    use_kernels(model, kernels)
    return model.eval()


def _load(source: TensorSource, dtype: str, device: torch.device) -> DeepseekV3:
    report = audit(source)
    report.raise_faults(source.path)
    model = empty(report.config, getattr(torch, dtype), device)
    _read(source, report.tensors, model)
    return model


def fill(model: DeepseekV3, path: str | os.PathLike[str]) -> None:
    """Reads what `model` holds of a checkpoint of its sizes, into its own dtype: a pipeline's stage
    holds a part. Files and errors as of `load`.
    """
    with open_source(checkpoint_path(path)) as opened:
        model.advice = advice_files(opened)
        report = audit(opened)
        report.raise_faults(opened.path)
        names = dict(model.named_parameters()) | dict(model.named_buffers())
        _read(opened, [tensor for tensor in report.tensors if tensor.parameter in names], model)


def _read(source: TensorSource, tensors: Sequence[StoredTensor], model: DeepseekV3) -> None:
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in track(tensors, "loading", source.num_bytes()):
            if tensor.kind != "copy":
                place = tensor.part_of(places[tensor.parameter])
                place.copy_(read_values(source, tensor, model.device))
        for tensor in tensors:
            if tensor.kind == "copy":
                _check_copy(source, tensor, tensor.part_of(places[tensor.parameter]))


def _check_copy(source: TensorSource, tensor: StoredTensor, original: Tensor) -> None:
    values = read_values(source, tensor).to(original.device, original.dtype)
    if not torch.equal(values, original):
        say_it_differs(source, tensor)
