"""A build: counts against recounting, and equality however it was run, interrupted or resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import rorqual.data.shards as shards_module
from holders import holder, started
from rorqual.config import fill
from rorqual.data import (
    DataSettings,
    Document,
    SourceSettings,
    TokenizerSettings,
    build,
    open_tokens,
)
from rorqual.data.plan import _chances
from rorqual.data.sources import fetch
from rorqual.errors import ConfigError, DataError, UsageError
from rorqual.locks import FileLock
from rorqual.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

Write = Callable[[Path, Iterable[Any]], Path]
CHAT = {"messages": [
    {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."},
]}  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str], write_jsonl: Write) -> Path:
    for n in range(3):
        write_jsonl(tmp_path / "corpus" / f"{n}.jsonl", texts[n * 20 : n * 20 + 20])
    return tmp_path / "corpus"


def _data(folder: Path, *sources: SourceSettings, **others: Any) -> DataSettings:
    return DataSettings(folder=str(folder), sources=list(sources), **{"held_out": 0.2, **others})


def _options(folder: Path) -> TokenizerSettings:
    return TokenizerSettings(folder=str(folder), vocab_size=400)


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "build.json"
    }


def _texts(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The documents of a split, read back from the tokens."""
    ids = np.concatenate([np.empty(0, np.int64), *open_tokens(folder).tokens]).astype(int).tolist()
    begin, end = tokenizer.decode([tokenizer.bos_id]), tokenizer.decode([tokenizer.eos_id])
    return [part.removeprefix(begin) for part in tokenizer.decode(ids).split(end)[:-1]]


def test_tokens_are_the_documents(
    tmp_path: Path, corpus: Path, texts: list[str], tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)), fim_rate=0.0)
    summary = build(data, _options(tokenizer_folder))
    train = _texts(tmp_path / "t/mine/train", tokenizer)
    held_out = _texts(tmp_path / "t/mine/held_out", tokenizer)
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert held_out
    manifest = summary.manifests["mine"]["train"]
    assert manifest["num_documents"] == len(train)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in train)
    assert manifest["num_tokens"] == sum(map(len, open_tokens(tmp_path / "t/mine/train").tokens))
    opened = open_tokens(tmp_path / "t/mine/train")
    assert all(isinstance(tokens, np.memmap) for tokens in opened.tokens)
    assert opened.tokens[0].dtype == np.uint16


def test_duplicates_go_across_sources(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, write_jsonl: Write
) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [texts[0], texts[1], texts[0].replace(" ", "  ")])
    second = write_jsonl(tmp_path / "b.jsonl", [texts[1], texts[2]])
    sources = [
        SourceSettings(name="a", path=str(first)),
        SourceSettings(name="b", path=str(second)),
    ]
    for dedupe, counts in ((True, [(2, 1), (1, 1)]), (False, [(3, 0), (2, 0)])):
        data = _data(tmp_path / f"t{dedupe}", *sources, held_out=0.0, dedupe=dedupe)
        manifests = build(data, _options(tokenizer_folder)).manifests
        found = [manifests[name]["train"] for name in "ab"]
        assert [(m["num_documents"], m["num_duplicates"]) for m in found] == counts


def test_same_tokens_for_one_and_two_workers(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    for workers in (1, 2):
        data = _data(tmp_path / str(workers), SourceSettings(name="mine", path=str(corpus)))
        build(data, _options(tokenizer_folder), workers=workers)
    assert _tree(tmp_path / "1") == _tree(tmp_path / "2")


def test_a_build_tells_what_it_works_on_and_prints_nothing(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = _data(tmp_path / "tokens", SourceSettings(name="mine", path=str(corpus)))
    told: list[str] = []

    def advance(title: str, done: int, total: int | None, detail: str) -> None:
        assert total is None or done <= total
        told.append(title)

    build(data, _options(tmp_path / "new"), advance=advance)
    titles = ["gathering", "reading", "training the tokenizer", "tokenising"]
    assert list(dict.fromkeys(told)) == titles
    told.clear()
    build(data, _options(tmp_path / "new"), advance=advance)
    assert told == []
    assert capfd.readouterr() == ("", "")


def test_interrupted_build_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceSettings(name="mine", path=str(corpus))
    build(_data(tmp_path / "whole", source), _options(tokenizer_folder))

    written: list[Path] = []
    write = shards_module._write_shard

    def killed(documents: Any, folder: Path, name: str, *rest: Any) -> None:
        if len(written) == 3:
            (folder / f".{name}.tokens.half").write_bytes(b"half")  # what a kill -9 leaves
            raise KeyboardInterrupt
        written.append(folder / name)
        write(documents, folder, name, *rest)

    monkeypatch.setattr(shards_module, "_write_shard", killed)
    data = _data(tmp_path / "t", source)
    with pytest.raises(KeyboardInterrupt):
        build(data, _options(tokenizer_folder))
    with pytest.raises(DataError, match="did not end"):
        open_tokens(tmp_path / "t/mine/train")
    monkeypatch.setattr(shards_module, "_write_shard", write)
    times = {path: path.with_suffix(".tokens").stat().st_mtime_ns for path in written}
    assert not build(data, _options(tokenizer_folder)).was_done
    assert times == {path: path.with_suffix(".tokens").stat().st_mtime_ns for path in written}
    for half in (tmp_path / "t").rglob(".*"):
        half.unlink()
    assert _tree(tmp_path / "t") == _tree(tmp_path / "whole")


def test_finished_build_is_left_alone_until_something_changes(
    tmp_path: Path, corpus: Path, texts: list[str], tokenizer_folder: Path, write_jsonl: Write
) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)))
    first = build(data, _options(tokenizer_folder))
    again = build(data, _options(tokenizer_folder))
    assert (first.was_done, again.was_done) == (False, True)
    assert again.manifests == first.manifests
    write_jsonl(corpus / "1.jsonl", [texts[0], "new text"])
    changed = build(data, _options(tokenizer_folder))
    assert not changed.was_done
    assert changed.total("num_documents") < first.total("num_documents")
    (tmp_path / "t/mine/train/manifest.json").unlink()
    assert not build(data, _options(tokenizer_folder)).was_done
    other = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)), seed=1)
    assert not build(other, _options(tokenizer_folder)).was_done


def test_shards_of_a_tokenizer_that_was_replaced_are_made_again(
    tmp_path: Path, corpus: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)), fim_rate=0.0)
    tokenizer.save(tmp_path / "tokenizer")
    first = build(data, _options(tmp_path / "tokenizer"))
    shutil.rmtree(tmp_path / "tokenizer")
    other = train_tokenizer(texts[:7], 350)
    other.save(tmp_path / "tokenizer")
    second = build(data, _options(tmp_path / "tokenizer"))
    assert not second.was_done
    assert second.total("num_documents") == first.total("num_documents")
    assert set(_texts(tmp_path / "t/mine/train", other)) <= set(texts)
    assert build(data, _options(tmp_path / "tokenizer")).was_done


def test_a_second_build_of_a_folder_is_refused(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)))
    with started(holder(tmp_path / "t"), "held"):
        with pytest.raises(UsageError, match="another process builds"):
            build(data, _options(tokenizer_folder))
        assert [path.name for path in (tmp_path / "t").iterdir()] == [".lock"]
    build(data, _options(tokenizer_folder))
    assert not (tmp_path / "t/.lock").exists()
    # What is whole is only read: any number of runs may begin on it.
    with started(holder(tmp_path / "t"), "held"):
        assert build(data, _options(tokenizer_folder)).was_done


def test_a_second_training_of_a_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)))
    with (
        FileLock(tmp_path / ".tok.lock", "held"),
        pytest.raises(UsageError, match="another process trains this tokenizer"),
    ):
        build(data, _options(tmp_path / "tok"))
    build(data, _options(tmp_path / "tok"))
    assert not (tmp_path / ".tok.lock").exists()


def test_a_second_fetch_of_a_source_is_refused(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".parables.lock", "held"),
        pytest.raises(UsageError, match="another process fetches"),
    ):
        fetch("parables", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_conversations_have_masks(
    tmp_path: Path,
    texts: list[str],
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    write_jsonl: Write,
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [texts[0], CHAT])
    data = _data(tmp_path / "t", SourceSettings(path=str(path)), held_out=0.0, fim_rate=0.0)
    build(data, _options(tokenizer_folder))
    opened = open_tokens(tmp_path / "t/chat.jsonl/train")
    ids, mask = tokenizer.encode_training(CHAT["messages"])
    assert opened.masks is not None
    assert opened.tokens[0][-len(ids) :].tolist() == ids
    assert opened.masks[0][-len(ids) :].tolist() == mask
    assert opened.masks[0][: -len(ids)].all()
    assert opened.text_bytes == len(texts[0].encode()) + len("The cat.")


def test_tools_of_a_conversation_are_in_its_tokens(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer, write_jsonl: Write
) -> None:
    """From lines and from parquet."""
    function = {"name": "look", "description": "", "parameters": {"type": "object"}}
    record = CHAT | {"tools": [{"type": "function", "function": function}]}
    write_jsonl(tmp_path / "chat" / "a.jsonl", [record])
    table = pyarrow.table({"messages": [record["messages"]], "tools": [record["tools"]]})
    pyarrow.parquet.write_table(table, tmp_path / "chat" / "b.parquet")
    source = SourceSettings(name="chat", path=str(tmp_path / "chat"))
    data = _data(tmp_path / "t", source, held_out=0.0, dedupe=False)
    build(data, _options(tokenizer_folder))
    ids, _ = tokenizer.encode_training(record["messages"], record["tools"])
    assert "look" in tokenizer.decode(ids)
    found = np.concatenate(open_tokens(tmp_path / "t/chat/train").tokens).tolist()
    assert found == [*ids, *ids]


def test_generated_sources(tmp_path: Path, tokenizer_folder: Path) -> None:
    calls = []

    def stories(seed: int, count: int) -> Iterator[Document]:
        calls.append((seed, count))
        for n in range(count):
            yield Document(text=f"Generated {seed} {n}")

    source = SourceSettings(name="generated:stories", max_documents=70)
    data = _data(tmp_path / "t", source, seed=5)
    summary = build(data, _options(tokenizer_folder), {"stories": stories})
    assert summary.total("num_documents") == 70
    assert summary.total("num_documents", "held_out") == 0
    assert set(calls) == {(5, 70)}
    assert build(data, _options(tokenizer_folder), {"stories": stories}).was_done
    with pytest.raises(DataError, match="no such generator"):
        build(data, _options(tokenizer_folder), {})


def test_tokenizer_is_trained_once_and_not_on_held_out(tmp_path: Path, corpus: Path) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)))
    options = _options(tmp_path / "tok")
    build(data, options)
    trained = load_tokenizer(tmp_path / "tok")
    assert 300 < trained.vocab_size <= 400
    before = _tree(tmp_path / "tok")
    build(_data(tmp_path / "t2", *data.sources), options)
    assert _tree(tmp_path / "tok") == before


def test_sample_is_balanced_by_bytes() -> None:
    assert _chances([100, 1000, 10_000], 900) == pytest.approx([1.0, 0.4, 0.04])
    assert _chances([100, 0], 1000) == [1.0, 0.0]


def test_limits_are_obeyed(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    source = SourceSettings(name="mine", path=str(corpus), max_documents=7)
    summary = build(_data(tmp_path / "t", source), _options(tokenizer_folder))
    assert summary.total("num_documents") + summary.total("num_documents", "held_out") == 7


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"folder": "t"}, "sources is empty"),
        ({"folder": "t", "sources": [{}]}, "needs a name"),
        ({"folder": "t", "sources": [{"name": "wordnt"}]}, "no such source 'wordnt'"),
        ({"folder": "t", "sources": [{"name": "generated:x"}]}, "needs max_documents"),
        ({"folder": "t", "sources": [{"name": "wordnet"}] * 2}, "share the folder name wordnet"),
        (
            {"folder": "t", "sources": [{"name": "wordnet"}], "fim_rate": 2},
            "fim_rate: Input should be less than or equal to 1",
        ),
        (
            {"folder": "t", "sources": [{"name": "wordnet", "epochs": -1}]},
            "epochs: Input should be greater than or equal to 0",
        ),
        ({"folder": "t", "sources": [{"name": "wordnet", "epoch": 1}]}, "did you mean 'epochs'"),
    ],
)
def test_broken_settings(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fill(DataSettings, table, where="recipe.toml")


@pytest.mark.parametrize("is_removed", [True, False])
@pytest.mark.parametrize("name", ["00000.tokens", "00000.mask", "manifest.json"])
def test_a_build_mends_shards_that_are_broken(
    tmp_path: Path,
    texts: list[str],
    tokenizer_folder: Path,
    write_jsonl: Write,
    name: str,
    is_removed: bool,
) -> None:
    """As the error of `open_tokens` advises. Oracle: the same build in another folder."""
    path = write_jsonl(tmp_path / "chat.jsonl", [*texts, CHAT])
    source = SourceSettings(name="mine", path=str(path))
    whole, data = _data(tmp_path / "whole", source), _data(tmp_path / "t", source)
    for each in (whole, data):
        build(each, _options(tokenizer_folder))
    broken = tmp_path / "t/mine/train" / name
    broken.write_bytes(broken.read_bytes()[:-2])
    if is_removed:
        broken.unlink()
    with pytest.raises(DataError, match="rorqual data build"):
        open_tokens(broken.parent)
    assert not build(data, _options(tokenizer_folder)).was_done
    assert _tree(tmp_path / "t") == _tree(tmp_path / "whole")
    assert build(data, _options(tokenizer_folder)).was_done


def test_broken_shards(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    data = _data(tmp_path / "t", SourceSettings(name="mine", path=str(corpus)))
    build(data, _options(tokenizer_folder))
    folder = tmp_path / "t/mine/train"
    tokens = folder / "00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match="another size") as caught:
        open_tokens(folder)
    assert "00000.tokens" in str(caught.value)
    tokens.unlink()
    with pytest.raises(DataError, match="no such file"):
        open_tokens(folder)
    manifest = folder / "manifest.json"
    for text, words in (("{}", "not a folder of token shards"), ("{", "not valid JSON")):
        manifest.write_text(text)
        with pytest.raises(DataError, match=words):
            open_tokens(folder)
    manifest.write_text(json.dumps({"format": shards_module.FORMAT}))
    with pytest.raises(DataError, match="manifest is broken"):
        open_tokens(folder)
