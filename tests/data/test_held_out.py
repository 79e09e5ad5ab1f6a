"""What is held out of a source: a share, never all and never nothing; files that change meanwhile.

Oracle: the text itself, counted again.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rorqual.data import (
    DataSettings,
    SourceSettings,
    TokenizerSettings,
    build,
    open_tokens,
    shards,
)
from rorqual.data.plan import _chances
from rorqual.data.selection import HASH, held_out_mask, held_out_of
from rorqual.errors import DataError
from rorqual.tokenizer import Tokenizer

build_module = importlib.import_module("rorqual.data.build")  # its room has a function so named
SHARE_ERROR = 0.6  # of 64 blocks or more, a fifth: three deviations of a binomial


def settings(folder: Path, path: Path, **others: Any) -> DataSettings:
    values = {"held_out": 0.2, "fim_rate": 0.0, "split_punctuation_rate": 0.0, **others}
    return DataSettings(folder=str(folder), sources=[SourceSettings(path=str(path))], **values)


def words(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents of a split, as text."""
    ids = np.concatenate([np.empty(0, np.int64), *open_tokens(folder / split).tokens]).tolist()
    begin, end = tokenizer.decode([tokenizer.bos_id]), tokenizer.decode([tokenizer.eos_id])
    return [part.removeprefix(begin) for part in tokenizer.decode(ids).split(end)[:-1]]


@pytest.mark.parametrize("num_lines", [40, 400, 4000])
def test_a_share_of_one_text_file_is_held_out(
    tmp_path: Path, num_lines: int, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    lines = [f"Line {n} of the only text." for n in range(num_lines)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    data = settings(tmp_path / "t", tmp_path / "a.txt")
    summary = build(data, TokenizerSettings(folder=str(tokenizer_folder)))
    train = words(tmp_path / "t/a.txt", "train", tokenizer)
    held_out = words(tmp_path / "t/a.txt", "held_out", tokenizer)
    found = "".join(train + held_out).split("\n")
    assert sorted(found[:-1]) == sorted(lines)
    assert train
    assert held_out
    share = summary.total("text_bytes", "held_out") / (tmp_path / "a.txt").stat().st_size
    if num_lines == 4000:
        assert share == pytest.approx(0.2, rel=SHARE_ERROR)
    # Blocks that follow each other are one document: breaks stand only where one was taken out.
    assert abs(len(train) - len(held_out)) <= 1


def test_without_a_share_a_text_stays_whole(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    text = "The same line again.\n" * 3000  # that repeats itself, which is no duplicate
    (tmp_path / "a.txt").write_text(text)
    data = settings(tmp_path / "t", tmp_path / "a.txt", held_out=0.0)
    build(data, TokenizerSettings(folder=str(tokenizer_folder)))
    assert words(tmp_path / "t/a.txt", "train", tokenizer) == [text]


def test_files_among_many_stay_whole(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    texts = [f"Story {n}. " + "It was long. " * 50 for n in range(100)]
    for n, text in enumerate(texts):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / f"many/{n:03}.txt").write_text(text)
    data = settings(tmp_path / "t", tmp_path / "many")
    build(data, TokenizerSettings(folder=str(tokenizer_folder)))
    found = [words(tmp_path / "t/many", split, tokenizer) for split in ("train", "held_out")]
    assert sorted(found[0] + found[1]) == sorted(texts)
    assert all(found)


def test_each_document_is_joined_up_to_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: twelve blocks of ten characters, and room for forty."""
    monkeypatch.setattr(shards, "MAX_TEXT_CHARACTERS", 40)
    text = "123456789\n" * 12
    (tmp_path / "a.txt").write_text(text)
    found = shards._taken(tmp_path / "a.txt", np.ones(12, dtype=bool), block_characters=10)
    assert [document.text for document in found] == [text[:40]] * 3


def test_what_stood_around_a_held_out_block_is_not_joined(tmp_path: Path) -> None:
    """By hand: blocks 0, 1, 3, 6 and 7 of nine."""
    text = "".join(f"{n}23456789\n" for n in range(9))
    (tmp_path / "a.txt").write_text(text)
    is_taken = np.isin(np.arange(9), [0, 1, 3, 6, 7])
    found = shards._taken(tmp_path / "a.txt", is_taken, block_characters=10)
    assert [document.text for document in found] == [text[:20], text[30:40], text[60:80]]


def test_the_tokenizer_sees_equal_shares_and_all_of_a_small_source() -> None:
    """By hand: of 150 bytes a source of 10 gives all, and the two others half of the rest."""
    assert _chances([100, 10, 100], 150) == [0.7, 1.0, 0.7]
    assert _chances([100, 0], 150) == [1.0, 0.0]


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.9999])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_never_all_and_never_nothing(share: float, count: int) -> None:
    raw = np.random.default_rng(count).integers(0, 2**63, (count, 2)).astype("<u8")
    hashes = raw.view(HASH).reshape(-1)
    is_kept = np.ones(count, dtype=bool)
    is_kept[0] = count < 3
    held_out = held_out_of(hashes, is_kept, share, seed=1)
    assert 0 < held_out.sum() < is_kept.sum()
    assert not held_out[~is_kept].any()
    order = np.arange(count)[::-1]
    assert (held_out_of(hashes[order], is_kept[order], share, seed=1) == held_out[order]).all()
    assert not held_out_of(hashes, is_kept, 0.0, seed=1).any()


@pytest.mark.parametrize("count", [2, 3, 50])
def test_who_moves_is_who_a_growing_share_takes_first_or_last(count: int) -> None:
    """So what is held out at one share is held out at every greater one."""
    raw = np.random.default_rng(count).integers(0, 2**63, (count, 2)).astype("<u8")
    hashes, everyone = raw.view(HASH).reshape(-1), np.ones(count, dtype=bool)
    masks = [held_out_mask(hashes, share, seed=1) for share in np.linspace(0, 1, 4097)]
    first = next(mask for mask in masks if mask.any())
    last = next(mask for mask in reversed(masks) if not mask.all())
    assert (first.sum(), last.sum()) == (1, count - 1)
    assert (held_out_of(hashes, everyone, 1e-12, seed=1) == first).all()
    assert (held_out_of(hashes, everyone, 1 - 1e-12, seed=1) == last).all()


def test_one_document_trains_and_that_is_said(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("One short line.")
    for seed in range(4):
        data = settings(tmp_path / f"t{seed}", tmp_path / "a.txt", held_out=0.9, seed=seed)
        summary = build(data, TokenizerSettings(folder=str(tokenizer_folder)))
        assert summary.total("num_documents") == 1
    assert "nothing is held out" in caplog.text


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    data = settings(tmp_path / "t", file)
    options = TokenizerSettings(folder=str(tokenizer_folder))
    real = build_module.select
    for later in ('{"text": "one"}\n{"text": "six"}\n', '{"text": "one"}\n', file.read_text() * 2):

        def changing(*arguments: Any, later: str = later) -> Any:
            file.write_text(later)
            os.utime(file, ns=(1, len(later)))
            return real(*arguments)

        monkeypatch.setattr(build_module, "select", changing)
        (tmp_path / "t/build.json").unlink(missing_ok=True)
        with pytest.raises(DataError, match="changed while it was read"):
            build(data, options)
        assert not (tmp_path / "t/build.json").exists()
        monkeypatch.setattr(build_module, "select", real)
        build(data, options)
        build(settings(tmp_path / "whole", file), options)
        for split in ("train", "held_out"):
            ours, fresh = (
                [part.tolist() for part in open_tokens(tmp_path / top / "a.jsonl" / split).tokens]
                for top in ("t", "whole")
            )
            assert ours == fresh


def test_a_source_that_changes_between_kill_and_resume(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of before the kill are made anew where their file is another."""
    for n in range(3):
        (tmp_path / "c").mkdir(exist_ok=True)
        lines = [f'{{"text": "file {n} line {i}"}}' for i in range(20)]
        (tmp_path / f"c/{n}.jsonl").write_text("\n".join(lines))
    options = TokenizerSettings(folder=str(tokenizer_folder))
    real, done = build_module._tokenise, []

    def killed(file: Path, *rest: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(file)
        real(file, *rest)

    monkeypatch.setattr(build_module, "_tokenise", killed)
    with pytest.raises(KeyboardInterrupt):
        build(settings(tmp_path / "t", tmp_path / "c"), options)
    monkeypatch.setattr(build_module, "_tokenise", real)
    path = tmp_path / "c/0.jsonl"
    status = path.stat()
    path.write_text(path.read_text().replace("line", "lane"))  # of the same size and time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for top in ("t", "whole"):
        build(settings(tmp_path / top, tmp_path / "c"), options)
    for split in ("train", "held_out"):
        for number in range(3):
            name = f"c/{split}/{number:05}.tokens"
            assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
