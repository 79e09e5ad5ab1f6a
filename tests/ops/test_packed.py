"""The C++ kernels, at every level that this processor has. Oracle: the decoded weights in torch,
with activations rounded here as the header says.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

import forked
from patience import HANG_SECONDS
from rorqual.ops import native, packed
from rorqual.ops.native import KINDS
from rorqual.ops.native.library import _share_threads
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.ops.quantise import decode_blocks, encode_blocks

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
LEVELS = ("portable", "avx2", "avx512")
CLOSE = 1e-5
SHAPES = ((16, 512), (40, 256), (5, 768), (1, 256), (33, 1024))


def rows_of(kind: str, num: int, num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Random matrices in the bytes of their file, (E, O, B)."""
    values = torch.randn(num * num_rows, num_columns, generator=torch.Generator().manual_seed(seed))
    if kind == "BF16":
        raw = values.bfloat16().view(torch.uint8)
    elif kind == "F32":
        raw = values.view(torch.uint8)
    else:
        raw = encode_blocks(values, kind)
    return raw.view(num, num_rows, -1)


def dense_of(rows_EOB: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "BF16":
        return rows_EOB.view(torch.bfloat16).float()
    if kind == "F32":
        return rows_EOB.view(torch.float32)
    return decode_blocks(rows_EOB.flatten(0, 1), kind).view(*rows_EOB.shape[:2], -1)


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations as the kernels take them: bfloat16, or 8 bits with a scale for each 32."""
    x = x.float()
    if kind == "BF16":
        return x.bfloat16().float()
    if kind == "F32":
        return x
    groups = x.unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    codes = groups * torch.where(most == 0, 0.0, 127 / most)
    return (codes.round() * (most / 127)).flatten(-2)


def product(x: torch.Tensor, packed_EP: torch.Tensor, kind: str, num_rows: int) -> torch.Tensor:
    return packed.multiply(x, packed_EP, kind, num_rows, torch.tensor([len(x)]))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_matrix_is_its_rows(kind: str, shape: tuple[int, int]) -> None:
    rows_EOB = rows_of(kind, 2, *shape)
    packed_EP = packed.pack(rows_EOB, kind, shape[1])
    for packed_P, rows_OB in zip(packed_EP, rows_EOB, strict=True):
        assert torch.equal(packed.unpack(packed_P, kind, shape[1], 0, shape[0]), rows_OB)
    whole_tiles = -(-shape[0] // 16) * 16
    assert packed_EP.shape[1] == whole_tiles * QUANT_TYPES[kind].num_bytes(shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_tiles_are_the_rows_values(kind: str) -> None:
    """The last tile is ragged; the least width is one block."""
    block = QUANT_TYPES[kind].block_values
    for num_rows, num_columns in (*SHAPES, (17, max(2, block)), (3, 3 * max(2, block))):
        rows_EOB = rows_of(kind, 1, num_rows, num_columns)
        packed_EP, wanted = packed.pack(rows_EOB, kind, num_columns), dense_of(rows_EOB, kind)[0]
        found = packed.decode(packed_EP[0], kind, num_rows, num_columns)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7), (num_rows, num_columns)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_found_by_their_ids(kind: str) -> None:
    rows_EOB = rows_of(kind, 1, 40, 256)
    packed_P, ids = packed.pack(rows_EOB, kind, 256)[0], torch.tensor([39, 0, 15, 16, 0])
    wanted = dense_of(rows_EOB, kind)[0, ids]
    found = packed.decode_rows(packed_P, kind, (40, 256), ids)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)
    for outside in (-1, 40):
        with pytest.raises(AssertionError):
            packed.decode_rows(packed_P, kind, (40, 256), torch.tensor([outside]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_products_are_those_of_the_decoded_weights(
    kind: str, num_threads: int, threads: Callable[[int], None]
) -> None:
    threads(num_threads)
    for shape in SHAPES:
        rows_EOB = rows_of(kind, 1, *shape)
        packed_EP, dense = packed.pack(rows_EOB, kind, shape[1]), dense_of(rows_EOB, kind)[0]
        for num in (0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 64, 65, 130):
            x = torch.randn(num, shape[1], generator=torch.Generator().manual_seed(num))
            found = product(x, packed_EP, kind, shape[0])
            assert found.shape == (num, shape[0])
            assert relative(found, rounded(x, kind) @ dense.t()) < CLOSE, (shape, num)
            narrow = product(x.bfloat16(), packed_EP, kind, shape[0])
            wanted = rounded(x.bfloat16(), kind) @ dense.t()
            assert narrow.dtype is torch.bfloat16
            assert relative(narrow.float(), wanted) < 1e-2, (shape, num)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(1, 0, 3), (0, 0, 0), (0, 70, 0), (5, 1, 9), (17, 64, 2)])
def test_each_rows_matrix_is_its_own(kind: str, counts: tuple[int, ...]) -> None:
    num_rows, num_columns = 24, 256
    rows_EOB = rows_of(kind, 3, num_rows, num_columns)
    packed_EP, dense = packed.pack(rows_EOB, kind, num_columns), dense_of(rows_EOB, kind)
    x = torch.randn(sum(counts), num_columns, generator=torch.Generator().manual_seed(1))
    found = packed.multiply(x, packed_EP, kind, num_rows, torch.tensor(counts))
    parts = rounded(x, kind).split(counts)
    wanted = torch.cat([part @ w.t() for part, w in zip(parts, dense, strict=True)])
    assert found.shape == wanted.shape
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_product_does_not_depend_on_its_company(
    kind: str, threads: Callable[[int], None]
) -> None:
    """Nor on the number of threads: to the last bit."""
    rows_EOB = rows_of(kind, 1, 40, 512)
    packed_EP = packed.pack(rows_EOB, kind, 512)
    x = torch.randn(23, 512, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([product(row[None], packed_EP, kind, 40) for row in x])
    for num_threads in (1, 2):
        threads(num_threads)
        assert torch.equal(product(x, packed_EP, kind, 40), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_have_one_order_for_every_number_of_rows(kind: str) -> None:
    """Of whole groups of rows and rests, of whole chunks of columns and rests, of many rows that
    share unpacked weights and of few; the last tile is ragged.
    """
    num_rows, num_columns = 56, 768 if kind.endswith("K") else 800
    rows_EOB = rows_of(kind, 1, num_rows, num_columns)
    packed_EP = packed.pack(rows_EOB, kind, num_columns)
    x = torch.randn(150, num_columns, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([product(row[None], packed_EP, kind, num_rows) for row in x])
    for num in (*range(1, 41), 127, 128, 129, 150):
        assert torch.equal(product(x[:num], packed_EP, kind, num_rows), alone[:num]), num


@pytest.mark.parametrize(
    ("kind", "num_columns"), [("BF16", 16_450), ("F32", 8_194), ("Q8_0", 30_880)]
)
def test_tiles_that_are_too_large_for_a_cache(kind: str, num_columns: int) -> None:
    """Kinds that are multiplied as they are stored: chunk by chunk where rows are many. Activations
    are whole numbers, that all kinds hold.
    """
    rows_EOB = rows_of(kind, 1, 40, num_columns)
    packed_EP, dense = packed.pack(rows_EOB, kind, num_columns), dense_of(rows_EOB, kind)[0]
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-127, 128, (27, num_columns), generator=generator).float()
    x[:, ::32] = 127
    found = product(x, packed_EP, kind, 40)
    assert relative(found, x @ dense.t()) < CLOSE
    assert torch.equal(found[24:], product(x[24:], packed_EP, kind, 40))


@pytest.fixture
def own_threads(threads: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """The library's own threads, which it uses where torch's are not libgomp's."""
    loaded = native.library()
    assert loaded is not None
    loaded.rq_use_openmp(None, None, None)
    yield threads
    _share_threads(loaded)


def test_threads_of_its_own_do_the_same(own_threads: Callable[[int], None]) -> None:
    """More than there is work for, and others than before."""
    rows_EOB = rows_of("F32", 1, 120, 32)
    packed_EP, dense = packed.pack(rows_EOB, "F32", 32), dense_of(rows_EOB, "F32")[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    own_threads(1)
    alone = product(x, packed_EP, "F32", 120)
    assert relative(alone, x @ dense.t()) < CLOSE
    for num_threads in (3, 7, 2, 64):
        own_threads(num_threads)
        for num in (5, 1):
            assert torch.equal(product(x[:num], packed_EP, "F32", 120), alone[:num]), num_threads


def multiplies_in_a_fork(threads: Callable[[int], None]) -> bool:
    """A fork copies no threads. Oracle: whole numbers, whose sums are exact."""
    packed_EP = packed.pack(torch.eye(96).view(torch.uint8).view(1, 96, -1), "F32", 96)
    x = torch.arange(96.0)[None]
    threads(3)
    assert torch.equal(product(x, packed_EP, "F32", 96), x)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # should it wait for threads that are not there
        is_right = torch.equal(product(x, packed_EP, "F32", 96), x)
        os._exit(0 if is_right else 1)
    return os.waitpid(child, 0)[1] == 0


def test_a_fork_multiplies_too(threads: Callable[[int], None]) -> None:
    assert multiplies_in_a_fork(threads)


def test_a_fork_makes_threads_of_its_own(own_threads: Callable[[int], None]) -> None:
    assert multiplies_in_a_fork(own_threads)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_codes_are_rounded_to_the_nearest_and_ties_to_even(kind: str) -> None:
    """Scales are 1: the products of halves tell how each was rounded."""
    x = torch.arange(-127.0, 129.0)
    x[-1] = 127
    x[1:31] = torch.arange(30) - 14.5
    x[33:63] = -x[1:31]
    x[63], x[64] = 127, 127
    w = torch.eye(256)
    rows_EOB = encode_blocks(w, kind).view(1, 256, -1)
    packed_EP, dense = packed.pack(rows_EOB, kind, 256), dense_of(rows_EOB, kind)[0]
    wanted = rounded(x[None], kind) @ dense.t()
    assert relative(product(x[None], packed_EP, kind, 256), wanted) < CLOSE


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_extreme_codes_do_not_overflow(kind: str) -> None:
    """The largest codes of weights and activations, of one sign and of both."""
    for sign in (1.0, -1.0):
        w = torch.full((16, 256), sign)
        w[:, ::32] = -sign if kind != "Q8_0" else sign
        rows_EOB = encode_blocks(w, kind).view(1, 16, -1)
        packed_EP, dense = packed.pack(rows_EOB, kind, 256), dense_of(rows_EOB, kind)[0]
        for of_x in (1.0, -1.0):
            x = torch.full((3, 256), of_x)
            assert relative(product(x, packed_EP, kind, 16), x @ dense.t()) < CLOSE


def test_the_least_code_of_q8_0() -> None:
    """-128 is no code that we write, and files may have it."""
    rows_EOB = torch.zeros(1, 16, 34, dtype=torch.uint8)
    rows_EOB[..., :2] = torch.tensor([1.0]).half().view(torch.uint8)
    rows_EOB[..., 2:] = 128
    packed_EP = packed.pack(rows_EOB, "Q8_0", 32)
    for of_x in (1.0, -1.0):
        found = product(torch.full((1, 32), of_x), packed_EP, "Q8_0", 16)
        assert torch.allclose(found, torch.full((1, 16), -128.0 * 32 * of_x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_number_that_is_not_finite_has_no_finite_result(
    kind: str, value: float
) -> None:
    """Wherever in the row it stands; other rows are as they were. Weights have no zeros."""
    packed_EP = packed.pack(rows_of(kind, 1, 16, 256).abs(), kind, 256)
    if kind not in ("BF16", "F32"):
        weights = torch.rand(16, 256, generator=torch.Generator().manual_seed(1)) + 1
        packed_EP = packed.pack(encode_blocks(weights, kind).view(1, 16, -1), kind, 256)
    fine = torch.randn(9, 256, generator=torch.Generator().manual_seed(4))
    wanted = product(fine, packed_EP, kind, 16)
    for place in (0, 1, 15, 16, 20, 31, 100, 255):
        x = fine.clone()
        x[3, place] = value
        found = product(x, packed_EP, kind, 16)
        assert not found[3].isfinite().any(), place
        assert torch.equal(found[[0, 1, 2, 4, 5, 6, 7, 8]], wanted[[0, 1, 2, 4, 5, 6, 7, 8]])


def test_what_is_not_the_matrixs_is_refused() -> None:
    """Nothing is read beyond its end."""
    packed_EP = packed.pack(rows_of("Q8_0", 1, 16, 256), "Q8_0", 256)
    with pytest.raises(AssertionError, match="x has 512 columns, and a packed matrix 4352 bytes"):
        product(torch.zeros(2, 512), packed_EP, "Q8_0", 16)
    with pytest.raises(AssertionError, match="packed matrix"):
        product(torch.zeros(2, 256), packed_EP, "Q8_0", 33)
    with pytest.raises(AssertionError, match=r"not torch\.float16"):
        product(torch.zeros(2, 256).half(), packed_EP, "Q8_0", 16)


def test_activations_without_an_inverse_are_zeros() -> None:
    """127 / 1e-38 is infinite."""
    for kind in ("Q8_0", "Q4_K", "Q6_K"):
        packed_EP = packed.pack(rows_of(kind, 1, 16, 256), kind, 256)
        assert not product(torch.full((2, 256), 1e-38), packed_EP, kind, 16).any()


def test_zeros_give_zeros() -> None:
    for kind in KINDS:
        packed_EP = packed.pack(rows_of(kind, 1, 16, 256), kind, 256)
        assert not product(torch.zeros(2, 256), packed_EP, kind, 16).any()


@pytest.mark.parametrize(
    ("kind", "width", "is_possible"),
    [
        ("Q8_0", 32, True), ("Q8_0", 48, False), ("Q4_K", 256, True), ("Q4_K", 128, False),
        ("Q6_K", 512, True), ("Q6_K", 257, False), ("BF16", 2, True), ("BF16", 3, False),
        ("F32", 32, True), ("F32", 1, False), ("Q5_K", 256, False), ("F16", 256, False),
    ],
)  # fmt: skip
def test_what_can_be_packed(kind: str, width: int, is_possible: bool) -> None:
    assert packed.can_pack(kind, width) is is_possible


@pytest.mark.parametrize("forced", LEVELS)
def test_every_level_passes_these_tests(forced: str) -> None:
    """A lower one is forced in a process of its own."""
    if forced == native.level():
        return
    environment = os.environ | {"RORQUAL_CPU": forced}
    code = "from rorqual.ops import native; print(native.level())"
    told = forked.run("-c", code, env=environment, timeout=HANG_SECONDS)
    assert told.stdout.decode().strip() in LEVELS[: LEVELS.index(forced) + 1]
    flags = ["-n0", "-q", "-p", "no:cacheprovider", "-k", "not every_level"]
    done = forked.run("-m", "pytest", *flags, __file__, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout.decode()
