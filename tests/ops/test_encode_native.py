"""The C++ encoders of GGUF's block types, at every level that this processor has. Oracle: the torch
encoders, byte for byte; what those are worth is tests/ops/test_k_quants.py's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import forked
from patience import HANG_SECONDS
from rorqual.errors import RorqualError
from rorqual.ops import native, quantise
from rorqual.ops.native import library
from rorqual.ops.quant_bits import mean_square, square_root, sum_rows
from rorqual.ops.quant_types import K_QUANTS, QUANT_TYPES, SMALL_BLOCKS
from rorqual.ops.quantise import encode_blocks

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
LEVELS = ("portable", "avx2", "avx512")
TYPES = (*SMALL_BLOCKS, *K_QUANTS)


def outcome(encode: Callable[[], Tensor]) -> bytes | str:
    try:
        return encode().numpy().tobytes()
    except RorqualError as problem:
        return str(problem)


def both(x: Tensor, name: str, importance: Tensor | None) -> tuple[bytes | str, bytes | str]:
    """What the library and the twin write, or how they refuse."""
    ours = outcome(lambda: encode_blocks(x, name, importance))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, "library", lambda: None)
        return ours, outcome(lambda: encode_blocks(x, name, importance))


def sample(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[1::3] = x[1::3].pow(3)
    x[2::3] += torch.randn(len(x[2::3]), 1, generator=generator)
    return 0.02 * x


def importance_of(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)).square() + 0.01


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_bytes_are_the_twin_s(name: str, is_weighted: bool) -> None:
    """Of 1 to 17 super-blocks and more, in rows of several widths, bfloat16's ties among them."""
    size = QUANT_TYPES[name].block_values
    for rows, blocks in ((0, 3), (1, 1), (1, 2), (3, 1), (1, 17), (5, 3), (67, 5), (2, 40)):
        x = sample(rows, blocks * size, seed=rows)
        importance = importance_of(blocks * size) if is_weighted else None
        for values in (x, x.bfloat16(), 1e4 * x, 1e-5 * x):
            ours, theirs = both(values, name, importance)
            assert ours == theirs, (rows, blocks)


ODD = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 1e-30, -1e-20, 9e-16, 2e-15, 6e-8, 0.25, -0.25,
     1.0, -1.0, 0.5, 1.5, 65504.0, -65520.0, 1e6, 2.7e8, -1e19, 3e38, -3.4e38]
)  # fmt: skip
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
PLAIN = st.floats(-1, 1, width=32)
ANY = st.one_of(ODD, FINITE, PLAIN, st.sampled_from([float("nan"), float("inf"), -float("inf")]))


def spread(values: list[float], shape: tuple[int, ...], seed: int) -> Tensor:
    """Of these values, each as often as chance has it, in runs of one or many."""
    generator = torch.Generator().manual_seed(seed)
    run = (1, 4, 64)[seed % 3]
    num = torch.Size(shape).numel()
    chosen = torch.randint(0, len(values), (-(-num // run),), generator=generator)
    return torch.tensor(values)[chosen.repeat_interleave(run)[:num]].view(shape)


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=30)
@given(
    values=st.one_of(
        st.lists(PLAIN, min_size=1, max_size=40),
        st.lists(st.one_of(ODD, PLAIN), min_size=1, max_size=12),
        st.lists(st.one_of(ODD, FINITE), min_size=1, max_size=40),
        st.lists(ANY, min_size=1, max_size=8),
    ),
    weights=st.one_of(
        st.none(),
        st.lists(st.floats(0, 8, width=32), min_size=1, max_size=20),
        st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=20),
    ),
    seed=st.integers(0, 2**31),
)
def test_odd_values_too(
    name: str, values: list[float], weights: list[float] | None, seed: int
) -> None:
    x = spread(values, (3, 512), seed)
    importance = None if weights is None else spread(weights, (512,), seed + 1)
    ours, theirs = both(x, name, importance)
    assert ours == theirs


@pytest.mark.parametrize("name", TYPES)
def test_a_view_is_encoded_as_its_copy(name: str) -> None:
    x = sample(512, 6)
    assert torch.equal(encode_blocks(x.t(), name), encode_blocks(x.t().clone(), name))
    wide = sample(4, 1024)
    halves = encode_blocks(wide[:, 256:768], name)
    assert torch.equal(halves, encode_blocks(wide[:, 256:768].clone(), name))


def test_threads_do_not_disturb_each_other() -> None:
    x, importance = sample(64, 2048), importance_of(2048)
    alone = {name: encode_blocks(x, name, importance) for name in TYPES}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(name, pool.submit(encode_blocks, x, name, importance)) for name in 4 * TYPES]
        assert all(torch.equal(job.result(), alone[name]) for name, job in jobs)


def test_what_cannot_be_encoded_is_said() -> None:
    loaded = library()
    assert loaded is not None
    x, out = torch.zeros(1, 300), torch.zeros(4096, dtype=torch.uint8)

    def status(type_id: int, rows: int, columns: int) -> int:
        found = loaded.rq_encode(type_id, x.data_ptr(), out.data_ptr(), rows, columns, None)
        return int(found)

    assert status(QUANT_TYPES["Q4_K"].type_id, 1, 256) == 0
    assert status(QUANT_TYPES["Q8_0"].type_id, 1, 288) == 0
    assert status(QUANT_TYPES["IQ2_S"].type_id, 1, 256) == 1
    assert status(0, 1, 256) == 1
    for rows, columns in ((1, 288), (-1, 256), (1, -256)):
        assert status(QUANT_TYPES["Q4_K"].type_id, rows, columns) == 2
    x[0, 255] = torch.nan
    assert status(QUANT_TYPES["Q6_K"].type_id, 1, 256) == native.BAD_VALUE


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_one_block_without_a_scale_is_enough(name: str, is_weighted: bool) -> None:
    """Whichever it is: float16 holds no scale for 2^28."""
    size = QUANT_TYPES[name].block_values
    importance = importance_of(3 * size) if is_weighted else None
    for row, block in ((0, 0), (0, 2), (1, 1), (1, 2)):
        x = sample(2, 3 * size)
        x[row, block * size : (block + 1) * size] = -(2.0**28)
        with pytest.raises(RorqualError):
            encode_blocks(x, name, importance)


def test_sums_do_not_depend_on_the_number_of_columns() -> None:
    x = sample(32, 100)
    whole = sum_rows(x)
    torch.testing.assert_close(whole, x.double().sum(0).float(), rtol=1e-5, atol=1e-6)
    for columns in (1, 7, 33):
        assert torch.equal(sum_rows(x[:, :columns].contiguous()), whole[:columns])
    rows = sample(5, 416)
    expected = rows.double().square().mean(1, keepdim=True).float()
    torch.testing.assert_close(mean_square(rows), expected)


def test_roots_are_rounded_correctly() -> None:
    """Oracle: a root's neighbours are not nearer."""
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    root, exact = square_root(x), x.double().sqrt()
    for away in (0.0, torch.inf):
        beside = torch.nextafter(root, torch.full_like(root, away)).double()
        assert ((root.double() - exact).abs() <= (beside - exact).abs()).all()


def digest() -> str:
    """Of plain and odd values, with and without an importance."""
    values = [0.0, -0.0, 1e-45, 1e-40, 6e-8, -1e-20, 2e-15, 0.25, -0.25, 1.5, -0.7, 1e4]
    inputs = (sample(67, 1280), spread(values, (20, 1280), 0), spread(values, (9, 1280), 2))
    found = hashlib.sha256()
    for name in TYPES:
        for x in inputs:
            for importance in (None, importance_of(1280)):
                found.update(encode_blocks(x, name, importance).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("forced", LEVELS)
def test_every_level_writes_these_bytes(forced: str) -> None:
    """A lower one is forced in a process of its own."""
    environment = os.environ | {"RORQUAL_CPU": forced}
    done = forked.run(__file__, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    level, found = done.stdout.decode().split()
    assert level in LEVELS[: LEVELS.index(forced) + 1]
    assert found == digest()


if __name__ == "__main__":
    print(native.level(), digest())
