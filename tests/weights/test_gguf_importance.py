"""Importance matrices from files. Oracles: files written here byte by byte and by `gguf`, the
formula of llama.cpp's loader, and the weighted error itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import hf_oracle as oracle
import numpy as np
import pytest
import torch

from rorqual.errors import CheckpointError, UsageError
from rorqual.model import build
from rorqual.weights import save
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.gguf import importance as gguf_importance
from rorqual.weights.gguf.container import GgufWriter
from rorqual.weights.gguf.file import read_gguf
from rorqual.weights.gguf.importance import check_importance, fit_importance, read_importance
from rorqual.weights.gguf.names import gguf_tensors
from rorqual.weights.planned import PlannedTensor
from small import lively

CONFIG = oracle.WIDE.with_changes(
    vocab_size=320, moe_intermediate_size=256, kv_lora_rank=256, q_lora_rank=256
)
STACK = "blk.1.ffn_up_exps.weight"


def write_gguf_form(path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["whales.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        writer.add_tensor(name + ".in_sum2", values.astype(np.float32))
        writer.add_tensor(name + ".counts", counts[name].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat_form(path: Path, values: dict[str, np.ndarray], num_calls: int) -> Path:
    data = struct.pack("<i", len(values))
    for name, row in values.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", num_calls, row.size) + row.astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", 3, 10) + b"whales.txt")
    return path


def test_gguf_form_is_sums_over_counts(tmp_path: Path) -> None:
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    counts = np.array([[2], [0], [4]], dtype=np.float32)
    path = write_gguf_form(tmp_path / "i.gguf", {"a.weight": sums}, {"a.weight": counts})
    found = read_importance(path)
    assert list(found) == ["a.weight"]
    # An expert that no token reached has ones.
    assert found["a.weight"].tolist() == [0, 0.5, 1, 1.5, 1, 1, 1, 1, 2, 2.25, 2.5, 2.75]


def test_dat_form_is_values_over_calls(tmp_path: Path) -> None:
    rows = {"a.weight": np.array([2.0, 4.0]), "b.weight": np.array([6.0])}
    found = read_importance(write_dat_form(tmp_path / "imatrix.dat", rows, 2))
    assert {name: row.tolist() for name, row in found.items()} == {
        "a.weight": [1.0, 2.0],
        "b.weight": [3.0],
    }


def broken_files() -> dict[str, Callable[[Path], Path]]:
    one, count = {"a": np.ones((1, 4))}, {"a": np.ones((1, 1))}

    def cut(path: Path) -> Path:
        write_dat_form(path, {"a": np.ones(8)}, 1)
        path.write_bytes(path.read_bytes()[:20])
        return path

    def text(path: Path) -> Path:
        path.write_text("no matrix at all, but text")
        return path

    def empty(path: Path) -> Path:
        path.write_bytes(b"")
        return path

    def other(path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("a.weight", np.ones((2, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def negative(path: Path) -> Path:
        return write_gguf_form(path, {"a": -np.ones((1, 4))}, count)

    def infinite(path: Path) -> Path:
        return write_dat_form(path, {"a": np.array([np.inf])}, 1)

    def uneven(path: Path) -> Path:
        return write_gguf_form(path, one, {"a": np.ones((3, 1))})

    return {
        "wanted at": cut,
        "entries|a name of": text,
        "bytes wanted": empty,
        "none of them": other,
        "negative": negative,
        "not finite": infinite,
        "3 counts": uneven,
    }


@pytest.mark.parametrize("message", broken_files())
def test_broken_files_are_refused(tmp_path: Path, message: str) -> None:
    path = broken_files()[message](tmp_path / "imatrix")
    with pytest.raises(CheckpointError, match=message):
        read_importance(path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tensor = PlannedTensor("a.weight", "Q4_K", (3, 8, 256))
    fitted = fit_importance({"a.weight": torch.ones(768)}, [tensor], tmp_path)
    assert fitted["a.weight"].shape == (3, 256)
    with pytest.raises(UsageError, match=r"a\.weight does not fit") as problem:
        fit_importance({"a.weight": torch.ones(256)}, [tensor], tmp_path)
    assert "3 x 256" in str(problem.value)
    with pytest.raises(UsageError, match="knows none"):
        fit_importance({"b.weight": torch.ones(256)}, [tensor], tmp_path)


def test_the_weighted_error_falls(tmp_path: Path) -> None:
    """Every K-quant of the file, stacks of experts and both halves of kv_b_proj too."""
    torch.manual_seed(0)
    model = lively(CONFIG)
    save(model, tmp_path / "hf")
    sums, counts, means = {}, {}, {}
    generator = np.random.default_rng(0)
    for tensor in gguf_tensors(CONFIG):
        if len(tensor.shape) < 2:
            continue
        num_matrices = int(np.prod(tensor.shape[:-2], dtype=int))
        mean = np.exp(2 * generator.standard_normal((num_matrices, tensor.shape[-1])))
        counts[tensor.name] = np.full((num_matrices, 1), 7.0)
        sums[tensor.name] = 7 * mean
        means[tensor.name] = torch.from_numpy(mean).float()
    path = write_gguf_form(tmp_path / "imatrix.gguf", sums, counts)
    for name, imatrix in (("exact", None), ("plain", None), ("weighted", path)):
        target = Target.parse("gguf:F32" if name == "exact" else "gguf:Q3_K_M")
        convert(tmp_path / "hf", tmp_path / f"{name}.gguf", Options(target, imatrix=imatrix))
    with (
        read_gguf(tmp_path / "exact.gguf") as exact,
        read_gguf(tmp_path / "plain.gguf") as plain,
        read_gguf(tmp_path / "weighted.gguf") as weighted,
    ):
        num_checked = 0
        for name, info in weighted.tensors.items():
            if info.kind.name in ("F32", "F16"):
                continue
            weight = means[name].view(*info.shape[:-2], 1, info.shape[-1])
            errors = [
                float((weight * (file.read(name) - exact.read(name)).square()).sum())
                for file in (weighted, plain)
            ]
            assert errors[0] < 0.97 * errors[1], name
            num_checked += 1
    assert num_checked > 15


def test_a_wrong_file_leaves_nothing_behind(tmp_path: Path) -> None:
    save(build(CONFIG).eval(), tmp_path / "hf")
    path = write_dat_form(tmp_path / "imatrix.dat", {STACK: np.ones(5)}, 1)
    target = Target.parse("gguf:Q4_K_M")
    with pytest.raises(UsageError, match="does not fit"):
        convert(tmp_path / "hf", tmp_path / "out/m.gguf", Options(target, imatrix=path))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="for GGUF only"):
        Options(Target.parse("bf16"), imatrix=path)


def dat(*entries: tuple[bytes, int, list[float]], count: int | None = None) -> bytes:
    data = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data


def test_the_old_form_of_an_importance(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat((b"a" * 1024, 0, [3.0, 5.0]), (b"b", 1, [3.0]), (b"c", 4, [2.0, 0.0])))
    found = {name[0]: values.tolist() for name, values in read_importance(path).items()}
    assert found == {"a": [1.0, 1.0], "b": [3.0], "c": [0.5, 0.0]}
    for broken, said in (
        (dat((b"a" * 1025, 1, [1.0])), "a name of 1,025 bytes"),
        (dat((b"", 1, [1.0])), "a name of 0 bytes"),
        (dat((b"a", 1, [])), "0 values"),
        (dat(count=0), "0 entries"),
        (dat(count=gguf_importance.MAX_ENTRIES + 1), "1,000,001 entries"),
        (dat(count=gguf_importance.MAX_ENTRIES), "bytes wanted"),
        (dat((b"a", 1, [1.0]))[:-1], "4 bytes wanted"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=said):
            read_importance(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_importance(tmp_path / "absent")


def test_the_new_form_of_an_importance(tmp_path: Path) -> None:
    """Fewer than one call divides by one; a lone sum or count is no importance."""
    sums, counts = np.array([[2.0, 4.0], [3.0, 9.0]]), np.array([[0.5], [3.0]])
    path = write_gguf_form(tmp_path / "i.gguf", {"a": sums}, {"a": counts})
    assert read_importance(path)["a"].tolist() == [2.0, 4.0, 1.0, 3.0]
    for lone in ("a.in_sum2", "a.counts"):
        planned = PlannedTensor(lone, "F32", (1,))
        with GgufWriter(path, {}, [planned]) as writer:
            writer.write(planned, [torch.ones(1).view(torch.uint8)])
        with pytest.raises(CheckpointError, match="a without its"):
            read_importance(path)
    for kinds in (("F16", "F32"), ("F32", "F16")):
        pairs = zip(("a.in_sum2", "a.counts"), kinds, strict=True)
        halves = [PlannedTensor(name, kind, (1,)) for name, kind in pairs]
        with GgufWriter(path, {}, halves) as writer:
            for tensor in halves:
                writer.write(tensor, [torch.zeros(tensor.num_bytes, dtype=torch.uint8)])
        with pytest.raises(CheckpointError, match="a is not F32"):
            read_importance(path)


def test_an_importance_is_columns_or_columns_of_each_matrix() -> None:
    tensor = PlannedTensor("a", "F32", (3, 8, 4))
    for shape in ((4,), (3, 4)):
        check_importance({"a": torch.ones(shape), "unknown": torch.ones(9)}, [tensor])
    for shape in ((8,), (3, 8), (4, 3), (12,), (1, 4)):
        with pytest.raises(UsageError, match="of a does not fit"):
            check_importance({"a": torch.ones(shape)}, [tensor])
