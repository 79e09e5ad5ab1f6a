"""`rorqual cache`. Oracle: the files in the folder, and what was loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command import run

from rorqual.ops import native
from rorqual.weights import load, packed_cache, save
from small import SMALL, lively

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C++ compiler built the kernels"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, of which one is kept in two forms."""
    monkeypatch.setenv("RORQUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 0)
    for name in ("one", "two"):
        save(lively(SMALL), tmp_path / name, "bfloat16")
    load(tmp_path / "one", "native")
    load(tmp_path / "one", "int8")
    load(tmp_path / "two", "native")
    return tmp_path / "cache" / "packed"


def test_what_is_kept_is_listed(cache: Path, tmp_path: Path) -> None:
    rows = json.loads(run("cache", "list", "--json").out)
    found = sorted((Path(row["model"]).name, row["form"], row["state"]) for row in rows)
    assert found == [("one", "int8", "fits"), ("one", "native", "fits"), ("two", "native", "fits")]
    assert {row["file"] for row in rows} == {str(file) for file in cache.iterdir()}
    for row in rows:
        assert row["bytes"] == Path(row["file"]).stat().st_size
    printed = run("cache", "list").out
    assert f"GB in {cache}" in printed
    assert printed.count("fits") == 3


def test_what_does_not_fit_is_said(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "model.safetensors").touch()
    shutil.rmtree(tmp_path / "two")
    (cache / "broken.native.packed").write_bytes(b"RQ")
    rows = json.loads(run("cache", "list", "--json").out)
    states = {(Path(row["model"]).name, row["form"]): row["state"] for row in rows}
    assert states == {
        ("one", "native"): "the model's files have changed",
        ("one", "int8"): "the model's files have changed",
        ("two", "native"): "the model is gone",
        ("broken.native.packed", ""): "it is cut off",
    }
    done = run("cache", "verify")
    assert done.code == 2
    assert "rorqual cache clear" in done.out


def test_one_model_is_cleared_or_all(cache: Path, tmp_path: Path) -> None:
    refused = run("cache", "clear", tmp_path / "three")
    assert refused.code == 2
    assert "nothing is kept of" in refused.err
    assert run("cache", "clear", tmp_path / "one").out.startswith("2 removed, ")
    (left,) = cache.iterdir()
    assert left.name.startswith("two-")
    assert run("cache", "clear").out.startswith("1 removed, ")
    assert list(cache.iterdir()) == []
    assert run("cache", "clear").out == "0 removed, 0.00 GB freed\n"
    assert "0.00 GB in" in run("cache", "list").out


@pytest.mark.parametrize("name", ["one-*.int8.*", "two-*"])
def test_a_damaged_byte_is_found(name: str, cache: Path, tmp_path: Path) -> None:
    """In the first file as in the last."""
    done = run("cache", "verify")
    assert done.code == 0
    assert done.out.count(": whole\n") == 3
    (file,) = cache.glob(name)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    found = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))  # as a failing disk leaves it
    done = run("cache", "verify")
    assert done.code == 2
    assert f"{file}: damaged: " in done.out
    assert done.out.count(": whole\n") == 2
    other = "two" if name.startswith("one") else "one"
    assert run("cache", "verify", tmp_path / other).code == 0


def test_an_empty_cache_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_CACHE", str(tmp_path / "none"))
    assert json.loads(run("cache", "list", "--json").out) == []
    assert run("cache", "verify").code == 0
    refused = run("cache", "verify", "tiny")
    assert "nothing of any model" in refused.err
