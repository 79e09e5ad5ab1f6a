"""What an audit calls a fault and what it lets be, and the bounds that a conversion is held to.
Oracles: sources with entries made by hand; plain loops over blocks.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_oracle as oracle
import pytest
import torch

from rorqual.errors import CheckpointError
from rorqual.model import ModelConfig
from rorqual.weights import progress
from rorqual.weights.audit import Audit, audit
from rorqual.weights.convert.bounds import _block_amax, _spread
from rorqual.weights.convert.verify import Comparison, Fault, _with_fault
from rorqual.weights.folder import RESTORE, Folder, _is_inside
from rorqual.weights.names import tensors_of
from rorqual.weights.source import Entry, Quantisation

CONFIG = oracle.CONFIGS["mtp"]
PROJECTION = "model.layers.0.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SCALE = PROJECTION + "_scale_inv"


def source(config: ModelConfig = CONFIG, **more: Any) -> Folder:
    """All tensors of the shape in BF16, the bias in float32."""
    entries = {
        t.name: Entry(t.name, "a", t.shape, "F32" if t.kind == "bias" else "BF16")
        for t in tensors_of(config)
    }
    return Folder(Path("here"), config, more.pop("quantisation", None), entries, [], **more)


def put(folder: Folder, name: str, shape: tuple[int, ...], dtype: str) -> Folder:
    folder.entries[name] = Entry(name, "a", shape, dtype)
    return folder


def faults(folder: Folder) -> dict[str, list[str]]:
    return audit(folder).faults


def test_nothing_is_wrong_with_a_whole_source() -> None:
    found = audit(source())
    assert (found.faults, found.notes, found.config) == ({}, [], CONFIG)
    assert [t.name for t in found.tensors] == [t.name for t in tensors_of(CONFIG)]


def test_a_layer_that_is_absent_whole_is_the_configurations_fault() -> None:
    folder = source()
    for name in [n for n in folder.entries if n.startswith("model.layers.1.")]:
        del folder.entries[name]
    found = faults(folder)
    assert found.keys() == {"layers"}
    assert all(fault.startswith("missing: model.layers.1.") for fault in found["layers"])
    put(folder, "model.layers.1.input_layernorm.weight", (64,), "BF16")
    assert faults(folder).keys() == {"tensors"}
    del folder.entries["model.layers.1.input_layernorm.weight"]
    folder.faults.append("a file is broken")  # then nobody knows what it held
    assert faults(folder).keys() == {"files", "tensors"}
    folder.has_unreadable = True
    assert faults(folder) == {"files": ["a file is broken"]}


def test_copies_may_be_absent_and_mtp_layers_together() -> None:
    folder = source()
    first = "model.layers.3."
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        del folder.entries[first + name]
    assert faults(folder) == {}
    for name in [n for n in folder.entries if n.startswith(first)]:
        del folder.entries[name]
    found = audit(folder)
    assert found.faults == {}
    assert found.config == CONFIG.with_changes(num_nextn_predict_layers=0)
    assert "names 1 MTP layers, the files hold none" in found.notes[0]
    folder.faults.append("a file is broken")
    assert audit(folder).config == CONFIG


@pytest.mark.parametrize(
    ("layer", "kind"), [("2", "tensors"), ("3", "tensors"), ("4", "layers"), ("x", "tensors")]
)
def test_tensors_beyond_the_last_layer_are_the_configurations_fault(layer: str, kind: str) -> None:
    """Layer 3 is the MTP layer of three."""
    folder = put(source(), f"model.layers.{layer}.whale", (2,), "F32")
    assert faults(folder) == {kind: [f"unexpected: model.layers.{layer}.whale [2] in a"]}


def test_scales_belong_to_weights_in_fp8() -> None:
    fp8 = {"quantisation": Quantisation((32, 16))}
    folder = put(source(**fp8), PROJECTION, (64, 48), "F8_E4M3")
    assert faults(folder) == {"scales": [f"missing scale: {SCALE} [2, 3]"]}
    for dtype in ("F32", "BF16", "F8_E8M0"):
        assert faults(put(folder, SCALE, (2, 3), dtype)) == {}
    found = faults(put(folder, SCALE, (2, 3), "F16"))
    assert found == {"scales": [f"wrong dtype: {SCALE} is F16, expected F32, BF16, F8_E8M0"]}
    found = faults(put(folder, SCALE, (3, 2), "F32"))
    assert found == {"scales": [f"wrong shape: {SCALE} is [3, 2], expected [2, 3]"]}
    folder.quantisation = None
    assert faults(folder).keys() == {"quantisation"}
    other = put(source(), SCALE, (2, 3), "F32")
    assert faults(other) == {"scales": [f"unexpected: {SCALE} beside a weight in BF16"]}
    plain = put(source(**fp8), "lm_head.weight", (128, 64), "F8_E4M3")
    assert faults(put(plain, "lm_head.weight_scale_inv", (4, 4), "F32")) == {}
    alone = put(source(), "model.layers.0.whale.weight_scale_inv", (1, 1), "F32")
    assert faults(alone).keys() == {"tensors"}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind"),
    [
        (PROJECTION, (64, 48), "F16", None),
        (PROJECTION, (64, 48), "I8", "dtypes"),
        (PROJECTION, (64, 48), "Q8_K", "dtypes"),
        (PROJECTION, (48, 64), "I8", "shapes"),
        ("model.norm.weight", (64,), "F8_E4M3", "dtypes"),
        (BIAS, (8,), "F8_E4M3", "dtypes"),
        (BIAS, (8,), "F16", None),
    ],
)
def test_types_that_can_be_read(
    name: str, shape: tuple[int, ...], dtype: str, kind: str | None
) -> None:
    found = audit(put(source(quantisation=Quantisation()), name, shape, dtype))
    assert list(found.faults) == ([kind] if kind else [])
    assert any("rounded before we read it" in note for note in found.notes) is (name == BIAS)


def test_a_quantisation_that_nothing_uses_is_said() -> None:
    note = "config.json has a quantization_config, but no tensor is FP8: not used"
    folder = source(quantisation=Quantisation())
    assert audit(folder).notes == [note]
    folder.has_unreadable = True
    assert audit(folder).notes == []
    put(folder, PROJECTION, (64, 48), "F8_E4M3")
    folder.has_unreadable = False
    assert audit(folder).notes == []


MENDS = [
    ("layers", "num_hidden_layers"), ("quantisation", "quantization_config"),
    ("shapes", "belongs to another model"), ("files", RESTORE), ("dtypes", "convert these tensors"),
    ("scales", "quantise again"), ("tensors", "from one source"),
]  # fmt: skip


def test_the_mend_is_that_of_the_deepest_fault() -> None:
    report = Audit(CONFIG, [])
    report.raise_faults(Path("here"))
    for kind, mend in reversed(MENDS):
        report.add(kind, f"a fault of {kind}")
        with pytest.raises(CheckpointError) as caught:
            report.raise_faults(Path("here"))
        assert mend in str(caught.value.fix)
    one = Audit(CONFIG, [], {"tensors": ["a"]})
    with pytest.raises(CheckpointError, match=r"1 fault:\n  - a\n"):
        one.raise_faults(Path("here"))
    with pytest.raises(CheckpointError, match=r"2 faults:\n  - a\n  - b\n"):
        Audit(CONFIG, [], {"tensors": ["a", "b"]}).raise_faults(Path("here"))
    for num, rest in ((20, "- 19"), (21, "and 1 more"), (22, "and 2 more")):
        many = Audit(CONFIG, [], {"tensors": [str(i) for i in range(num)]})
        with pytest.raises(CheckpointError, match=f"{num} faults:") as caught:
            many.raise_faults(Path("here"))
        assert caught.value.what.endswith(rest)


def test_files_inside_a_folder() -> None:
    for name in ("a", "sub/a", "..a", "a..b"):
        assert _is_inside(name)
    for name in ("", "../a", "sub/../../a", "sub\\..\\a", "/a", "C:a", "\\\\host\\a", "a\0"):
        assert not _is_inside(name)


def test_bytes_of_types_that_nobody_reads_count_nothing() -> None:
    folder = Folder(Path("here"), CONFIG, None, {}, [])
    for name, dtype in (("a", "F32"), ("b", "BF16"), ("c", "F8_E4M3"), ("d", "I64")):
        put(folder, name, (2, 3), dtype)
    assert folder.num_bytes() == 6 * (4 + 2 + 1)


def test_blocks_that_are_not_square() -> None:
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    found = _block_amax(values, (2, 4))
    wanted = [
        [float(values[i : i + 2, j : j + 4].abs().max()) for j in range(0, 11, 4)]
        for i in range(0, 7, 2)
    ]
    assert found.tolist() == wanted
    wide = _spread(found, values.shape, (2, 4))
    assert wide.tolist() == [[wanted[i // 2][j // 4] for j in range(11)] for i in range(7)]


def test_the_worst_value_is_of_all_chunks() -> None:
    """By how far it is beyond its own bound; values and the first row are of them all."""

    def errors(*values: float) -> torch.Tensor:
        return torch.tensor(values).view(-1, 1)

    bound = errors(1.0, 1.0, 1.0)
    assert _with_fault(None, "a", 0, errors(1.0, 0.5, 0.0), bound, "BF16") is None
    first = _with_fault(None, "a", 10, errors(0.0, 2.0, 1.5), bound, "BF16")
    assert first == Fault("a", 2, 11, 2.0, 1.0, "BF16")
    assert _with_fault(first, "a", 20, errors(1.0, 0.0, 0.0), bound, "BF16") is first
    # An error of 3 with a bound of 2.5 is no worse than one of 2 with a bound of 1.
    more = _with_fault(first, "a", 20, errors(3.0, 0.0, 0.0), errors(2.5, 0.0, 0.0), "BF16")
    assert more == Fault("a", 3, 11, 2.0, 1.0, "BF16")
    worse = _with_fault(more, "a", 30, errors(0.0, 3.5, 0.0), bound, "BF16")
    assert worse == Fault("a", 4, 11, 3.5, 1.0, "BF16")
    lost = _with_fault(worse, "a", 40, errors(float("nan"), 9.0, 0.0), bound, "BF16")
    assert lost == Fault("a", 6, 11, float("inf"), 1.0, "BF16")
    assert str(first).startswith("a: 2 values from row 11 on")
    assert "a: 1 value from" in str(Fault("a", 1, 0, 2.0, 1.0, "F16"))
    assert "off by 2, where 1 is the bound" in str(first)


def test_errors_of_nothing_are_none() -> None:
    empty = Comparison("x", "F32", "BF16")
    assert (empty.relative_error, empty.is_within_bound) == (0.0, True)
    one = Comparison("x", "F32", "BF16", 1, 10, 2, 0.5, 4.0, 16.0)
    assert one.relative_error == 0.5
    one.add(Comparison("x", "F32", "BF16", 2, 5, 3, 0.25, 5.0, 20.0))
    row = one.as_row()
    assert (row["tensors"], row["elements"], row["unequal"], row["max_error"]) == (3, 15, 5, 0.5)
    assert row["relative_error"] == 0.5
    assert (row["from"], row["to"], row["is_within_bound"]) == ("F32", "BF16", True)


def test_a_bar_is_for_a_gigabyte_that_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.progress

    shown: list[str] = []

    def bar(items: list[int], description: str, **_: Any) -> list[int]:
        shown.append(description)
        return items

    monkeypatch.setattr(rich.progress, "track", bar)
    for is_terminal in (False, True):
        console = SimpleNamespace(is_terminal=is_terminal)
        monkeypatch.setattr(progress, "console", lambda found=console: found)
        for num_bytes in (999_999_999, 1_000_000_000):
            assert list(progress.track([1, 2], "reading", num_bytes)) == [1, 2]
        assert shown == (["reading 1.0 GB"] if is_terminal else [])
