"""Two thousand broken safetensors checkpoints: each is refused with a RorqualError or read whole,
within a second and in bounded memory. Oracle: no other exception, no crash.
"""

from __future__ import annotations

import random
import resource
import struct
import time
from pathlib import Path

import hf_oracle as oracle
import pytest

from rorqual.errors import RorqualError
from rorqual.weights import save
from rorqual.weights.audit import audit
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.open import open_source
from rorqual.weights.values import StoredRows
from small import lively

CONFIG = oracle.BASE.with_changes(num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=2)
NUM_FILES = 1000  # of each kind
MAX_SECONDS = 1.0
MAX_BYTES = 200_000_000
NUMBERS = ["-1", "1e9", "9" * 30, "18446744073709551615", "4294967296", "null", "[]", '"x"', "0"]
WORDS = ["F64", "F8_E5M2", "I4", "../../etc/passwd", "\\u0000", "BF16", "F32"]


def read_all(folder: Path) -> None:
    with open_source(folder) as source:
        report = audit(source)
        report.raise_faults(folder)
        for tensor in report.tensors:
            stored = StoredRows(source, tensor)
            for start, stop in stored.chunks():
                stored.values(start, stop)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mutate(data: bytes, source: random.Random) -> bytes:
    """One or two faults: flipped bytes, cuts, lengths, numbers or words of the header."""
    length = struct.unpack("<Q", data[:8])[0]
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2))):
        kind = source.randrange(7)
        end = min(8 + length, len(changed))
        if end < 16:
            break
        if kind == 0:
            changed[source.randrange(8, end)] = source.randrange(256)
        elif kind == 1:
            del changed[source.randrange(len(changed)) :]
        elif kind == 2:
            number = source.choice((0, 1, length - 8, length + 8, 2**63, 2**64 - 1, len(data)))
            changed[:8] = struct.pack("<Q", number)
        elif kind == 3:
            start = source.randrange(8, end)
            del changed[start : start + source.randrange(1, 40)]
        elif kind == 4:
            changed += bytes(source.randrange(1, 100))
        else:
            words = NUMBERS if kind == 5 else WORDS
            text = bytes(changed[8:end]).decode("utf-8", "replace")
            start = source.randrange(len(text))
            digits = [i for i, c in enumerate(text) if c.isdigit()] if kind == 5 else []
            start = source.choice(digits) if digits else start
            text = text[:start] + source.choice(words) + text[start + 1 :]
            header = text.encode("utf-8", "replace")
            changed[:end] = struct.pack("<Q", len(header)) + header
    return bytes(changed)


@pytest.mark.parametrize("kind", ["huggingface", "shards"])
def test_broken_files(kind: str, tmp_path: Path) -> None:
    model = lively(CONFIG)
    folder = tmp_path / "hf"
    save(model, folder, "fp8" if kind == "huggingface" else "bfloat16")
    if kind == "shards":
        convert(folder, tmp_path / "shards", Options(Target.parse("shards:2")))
        folder = tmp_path / "shards"
    file = sorted(folder.glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    read_all(folder)
    source = random.Random(0)
    num_refused = 0
    before = peak_bytes()
    for number in range(NUM_FILES):
        file.write_bytes(mutate(whole, source))
        began = time.thread_time()
        try:
            read_all(folder)
        except RorqualError:
            num_refused += 1
        assert time.thread_time() - began < MAX_SECONDS, f"file {number} took too long"
        assert peak_bytes() - before < MAX_BYTES, f"file {number}"
    assert num_refused > 0.7 * NUM_FILES, "the mutations do not break enough"
