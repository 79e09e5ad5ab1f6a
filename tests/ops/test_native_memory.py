"""The C++ kernels where memory, or threads, are short: an error in Python, and the process lives.

Each case is a process of its own, whose limits the system enforces.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.ops import native

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's"),
]
BEGIN = """
import resource, sys
import torch
from rorqual.ops import native, packed

threads, whose = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
if whose == "own":
    native.library().rq_use_openmp(None, None, None)

def pages(column):
    return int(open("/proc/self/statm").read().split()[column]) * resource.getpagesize()

def limit(kind, size):
    resource.setrlimit(kind, (size, resource.RLIM_INFINITY))
"""
# Sums of a thread take twice as much as the outputs, which just fit.
PRODUCT = (
    BEGIN
    + """
x, counts = torch.ones(128, 2, dtype=torch.bfloat16), torch.tensor([128])
ones = torch.ones(1, 200_000, 2, dtype=torch.bfloat16).view(torch.uint8)
w = packed.pack(ones, "BF16", 2)
packed.multiply(x, packed.pack(ones[:, :64], "BF16", 2), "BF16", 64, counts)
limit(resource.RLIMIT_AS, pages(0) + 70_000_000)
try:
    packed.multiply(x, w, "BF16", 200_000, counts)
except MemoryError as problem:
    print(problem)
limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
print(bool((packed.multiply(x, w, "BF16", 200_000, counts) == 2).all()))
"""
)
# A little more at each turn, until a step has what it needs.
LAYERS = (
    BEGIN
    + """
import tempfile
sys.path.insert(0, sys.argv[3])
import rorqual, small
from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model.served import use_kernels
from rorqual.weights import load

folder = tempfile.mkdtemp()
# As wide as that a thread's own memory for a row's extras is a map of its own.
config = small.SMALL.with_changes(intermediate_size=1 << 16, num_hidden_layers=1)
rorqual.save(small.lively(config), folder, dtype="float32")
model = load(folder, "int8")
use_kernels(model, "native")
runner = Runner(model, PagedLatentCache(config, (64, 16), "float32", torch.empty(0)))
runner.run([Span([7], 0, [1])])
spans = [Span([3 + i % 90 for i in range(150)], 0, range(20, 60))]
size, num_short, wanted, held = pages(0), 0, None, []
limit(resource.RLIMIT_AS, size)
for piece in (1 << 24, 1 << 20, 1 << 16):  # what is free within the process
    try:
        while True:
            held.append(torch.empty(piece, dtype=torch.uint8))
    except RuntimeError:
        pass
while wanted is None:
    limit(resource.RLIMIT_AS, size)
    try:
        wanted = runner.run(spans)[0]
    except (MemoryError, RuntimeError):
        num_short += 1
    limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    size += 1 << 18
print(num_short > 10)
print(torch.equal(runner.run(spans)[0], wanted))
"""
)
# A thread's stack has no room.
THREADS = (
    BEGIN
    + """
x, counts = torch.ones(40, 2), torch.tensor([40])
w = packed.pack(torch.ones(1, 64, 2).bfloat16().view(torch.uint8), "BF16", 2)
torch.set_num_threads(threads)
limit(resource.RLIMIT_AS, pages(0) + 4_000_000)
print(bool((packed.multiply(x, w, "BF16", 64, counts) == 2).all()))
"""
)


def said(code: str, threads: int, whose: str) -> list[str]:
    command = [sys.executable, "-c", code, str(threads), whose, str(Path(__file__).parents[1])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is larger is a map
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.splitlines()


@pytest.mark.parametrize("whose", ["torch's", "own"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_without_memory_is_an_error(threads: int, whose: str) -> None:
    (problem, is_right) = said(PRODUCT, threads, whose)
    assert problem == "the C++ kernels got no memory for a product's activations"
    assert is_right == "True"


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["torch's", "own"])
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_without_memory_are_an_error(threads: int, whose: str) -> None:
    assert said(LAYERS, threads, whose) == ["True", "True"]


def test_where_the_system_grants_no_threads_one_does_all() -> None:
    assert said(THREADS, 3, "own") == ["True"]
