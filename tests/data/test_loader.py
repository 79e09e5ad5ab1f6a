"""The loader against the plain concatenation of its tokens: every token once, one order for any
number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.data import Loader, held_out_bytes
from rorqual.data.loader import num_samples
from rorqual.data.selection import permutation
from rorqual.data.shards import FORMAT
from rorqual.errors import DataError, RorqualError

LENGTH, DEPTH = 8, 2
WIDTH = LENGTH + 1 + DEPTH


def _folder(path: Path, shards: list[np.ndarray], with_mask: bool = False) -> Path:
    """Token shards written by hand, so that the oracle is not the writer."""
    path.mkdir(parents=True)
    records = []
    for number, tokens in enumerate(shards):
        tokens.astype("<u2").tofile(path / f"{number:05d}.tokens")
        if with_mask:
            (tokens % 3 == 0).astype(np.uint8).tofile(path / f"{number:05d}.mask")
        records.append({"name": f"{number:05d}", "num_tokens": len(tokens)})
    manifest = {
        "format": FORMAT, "source": path.name, "dtype": "<u2", "has_mask": with_mask,
        "num_tokens": sum(map(len, shards)), "text_bytes": 100, "tokenizer": "t",
        "shards": records,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A source of 203 tokens in three shards, one of them empty; a masked one of 57."""
    first = np.split(np.arange(1, 204), [100, 100])
    return _folder(tmp_path / "a", first), _folder(tmp_path / "b", [np.arange(1000, 1057)], True)


def _targets(loader: Loader, counter: int, count: int) -> list[int]:
    """The main model's targets of some samples: places 1..L where the mask counts."""
    batch = loader.batch(counter, count)
    here = slice(1, LENGTH + 1)
    found: list[int] = batch.tokens_BS[:, here][batch.mask_BS[:, here]].tolist()
    return found


def test_each_token_is_predicted_once_a_pass(folders: tuple[Path, Path]) -> None:
    loader = Loader([(folders[0], 1.0), (folders[1], 2.0)], LENGTH, DEPTH, seed=1)
    size = loader.samples_per_pass
    assert size == -(-202 // LENGTH) + 2 * -(-56 // LENGTH)
    expected = Counter(range(2, 204)) + Counter({t: 2 for t in range(1001, 1057) if t % 3 == 0})
    orders = []
    for number in range(3):
        assert Counter(_targets(loader, number * size, size)) == expected
        orders.append([loader.locate(number * size + n) for n in range(size)])
    assert orders[0] != orders[1] != orders[2]


def test_samples_are_slices_of_the_stream(folders: tuple[Path, Path]) -> None:
    loader = Loader([(folders[0], 1.0)], LENGTH, DEPTH)
    stream = np.concatenate([np.arange(1, 204), np.zeros(WIDTH, int)])
    is_real = np.arange(len(stream)) < 203
    batch = loader.batch(0, loader.samples_per_pass)
    assert batch.tokens_BS.dtype == torch.int64
    assert batch.mask_BS.dtype == torch.bool
    assert batch.tokens_BS.shape == (loader.samples_per_pass, WIDTH)
    for row, tokens in enumerate(batch.tokens_BS):
        start = loader.locate(row)[1] * LENGTH
        assert tokens.tolist() == stream[start : start + WIDTH].tolist()
        assert batch.mask_BS[row].tolist() == is_real[start : start + WIDTH].tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_order_is_the_same_for_any_number_of_ranks(folders: tuple[Path, Path], world: int) -> None:
    loader = Loader([(path, 1.5) for path in folders], LENGTH, DEPTH, seed=2)
    for counter in range(0, 100, 8):
        whole = loader.batch(counter, 8)
        parts = [loader.batch(counter, 8, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part.tokens_BS for part in parts]), whole.tokens_BS)
        assert torch.equal(torch.cat([part.mask_BS for part in parts]), whole.mask_BS)


def test_resume_by_counter_with_other_batch_sizes(folders: tuple[Path, Path]) -> None:
    def loader() -> Loader:
        return Loader([(path, 0.7) for path in folders], LENGTH, DEPTH, seed=3)

    whole = torch.cat([loader().batch(n, 4).tokens_BS for n in range(0, 120, 4)])
    resumed = torch.cat([loader().batch(48, 2).tokens_BS, loader().batch(50, 70).tokens_BS])
    assert torch.equal(resumed, whole[48:])


def test_fractions_cover_the_source_over_passes(folders: tuple[Path, Path]) -> None:
    loader = Loader([(folders[0], 0.25)], LENGTH, DEPTH)
    total = loader.streams[0].num_samples
    passes = -(-total // loader.samples_per_pass)
    seen = Counter(loader.locate(n)[1] for n in range(passes * loader.samples_per_pass))
    assert set(seen) == set(range(total))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_targets_have_bytes(folders: tuple[Path, Path]) -> None:
    assert held_out_bytes(folders) == 200


def test_misuse_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    loader = Loader([(folders[0], 1.0)], LENGTH)
    for arguments in ((0, 6, 0, 4), (-1, 4), (0, 0), (0, 4, 2, 2), (0, 4, -1, 2)):
        with pytest.raises(RorqualError, match="cannot be divided"):
            loader.batch(*arguments)
    with pytest.raises(RorqualError, match="no samples of this length"):
        Loader([(folders[0], 1.0)], 0)
    with pytest.raises(RorqualError, match="no samples of this length"):
        Loader([(folders[0], 1.0)], 1, -1)
    for epochs in (-1.0, float("inf"), float("nan")):
        with pytest.raises(RorqualError, match="epochs"):
            Loader([(folders[0], 1.0), (folders[1], epochs)], LENGTH)
    with pytest.raises(DataError, match="not one sample"):
        Loader([(folders[0], 0.0)], LENGTH)
    other = _folder(tmp_path / "c", [np.arange(9)])
    manifest = json.loads((other / "manifest.json").read_text()) | {"tokenizer": "another"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="different tokenizers"):
        Loader([(folders[0], 1.0), (other, 1.0)], LENGTH)


@pytest.mark.parametrize(
    ("num_tokens", "num_wanted"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3)]
)
def test_a_token_more_than_fits_has_a_sample_of_its_own(
    tmp_path: Path, num_tokens: int, num_wanted: int
) -> None:
    """By hand: the first token is no target, and a sample of 8 has 8 targets."""
    path = _folder(tmp_path / "a", [np.arange(num_tokens)])
    assert num_samples(path, LENGTH, None) == num_wanted
    if num_wanted:
        assert Loader([(path, 1.0)], LENGTH).samples_per_pass == num_wanted
        assert Loader([(path, 1.0)], 1).samples_per_pass == num_tokens - 1


@pytest.mark.parametrize(("epochs", "num_wanted"), [(0.55, 14), (0.57, 15), (1.3, 34), (2.0, 52)])
def test_a_pass_has_the_nearest_number_of_samples(
    folders: tuple[Path, Path], epochs: float, num_wanted: int
) -> None:
    """Of 26: 14.3, 14.8, 33.8 and 52."""
    loader = Loader([(folders[0], epochs)], LENGTH)
    assert loader.samples_per_pass == num_wanted
    seen = Counter(loader.locate(n)[1] for n in range(num_wanted))
    assert set(seen.values()) <= {int(epochs), int(epochs) + 1}


def test_the_order_depends_on_the_seed(folders: tuple[Path, Path]) -> None:
    one, same, other = (Loader([(folders[0], 1.0)], LENGTH, seed=seed) for seed in (1, 1, 2))
    orders = [[loader.locate(n) for n in range(26)] for loader in (one, same, other)]
    assert orders[0] == orders[1] != orders[2]


def test_the_order_is_that_of_every_run_before(folders: tuple[Path, Path]) -> None:
    """By the rule: a pass's places are shuffled by (seed, 2, pass), and each source's samples by
    (seed, 1, source), of which a pass takes the next ones.
    """
    loader = Loader([(folders[0], 0.5), (folders[1], 2.0)], LENGTH, seed=5)
    for number in range(3):
        samples = []
        for source, (taken, size) in enumerate(((13, 26), (14, 7))):
            order = permutation(size, 5, 1, source).tolist()
            samples += [(source, order[(number * taken + n) % size]) for n in range(taken)]
        expected = [samples[place] for place in permutation(27, 5, 2, number)]
        assert [loader.locate(number * 27 + n) for n in range(27)] == expected


def test_advice_on_no_samples_is_of_their_reason(tmp_path: Path) -> None:
    full = _folder(tmp_path / "full", [np.arange(20)])
    none = _folder(tmp_path / "none", [np.arange(0)])
    with pytest.raises(DataError, match="raise the epochs of a source"):
        Loader([(full, 0.0)], LENGTH, DEPTH)
    with pytest.raises(DataError, match="add text") as caught:
        Loader([(none, 1.0)], LENGTH, DEPTH)
    assert "epochs" not in str(caught.value)
