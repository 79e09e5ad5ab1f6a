"""Kimi-K2's and Moonlight's folders. Oracle: the `tiktoken` package with the same tokens.

The vocabulary is learnt on the spot; what is Kimi's are the files' form, the expression and the
names and places of the special tokens.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.errors import TokenizerError
from rorqual.tokenizer import Tokenizer, load_tokenizer
from rorqual.weights.gguf.tokenizer import (
    KINDS,
    MERGES,
    PRE,
    WHOLE,
    tokenizer_metadata,
    tokenizer_of,
)

# As published in Kimi-K2's tokenization_kimi.py.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# A token that no merges lead to: only a whole piece becomes it.
WHOLE_WORD = b" qwzxqk"


@pytest.fixture(scope="module")
def tokens(small: Tokenizer) -> list[bytes]:
    first = len(("bos", "eos", "pad"))
    specials = set(small.special_ids.values())
    ids = [i for i in range(first, small.vocab_size) if i not in specials]
    return [*(small.token_bytes[i] for i in ids), WHOLE_WORD]


@pytest.fixture(scope="module")
def folder(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi")
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    first = len(tokens)
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 255: "[PAD]"}
    config = {
        "added_tokens_decoder": {
            str(first + place): {"content": name, "special": True} for place, name in names.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this file was run')\n")
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(tokens: list[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_special_tokens_have_their_names_and_places(ours: Tokenizer, tokens: list[bytes]) -> None:
    first = len(tokens)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (first, first + 1, first + 255)
    assert ours.special_ids["<|im_end|>"] == first + 2
    assert ours.special_ids[f"<|reserved_token_{first + 4}|>"] == first + 4
    assert ours.vocab_size == first + 256
    assert ours.encode_chat([{"role": "user", "content": "[EOS]"}])[0] == first
    assert first + 1 not in ours.encode_chat([{"role": "user", "content": "[EOS]"}])


@pytest.mark.parametrize("place", [255, 256, 300])
def test_a_name_behind_the_reserved_ids_has_its_place(
    folder: Path, tokens: list[bytes], place: int, tmp_path: Path
) -> None:
    """There are 256 ids, or as many as the last name needs, and none behind it."""
    (tmp_path / "tiktoken.model").write_bytes((folder / "tiktoken.model").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    token_id = len(tokens) + place
    config["added_tokens_decoder"][str(token_id)] = {"content": "<|late|>", "special": True}
    config["pad_token"] = "<|late|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == tokenizer.special_ids["<|late|>"] == token_id
    assert tokenizer.vocab_size == token_id + 1
    before = token_id - 2  # the place before may be 255, which has a name
    assert tokenizer.special_ids[f"<|reserved_token_{before}|>"] == before


def test_a_whole_piece_is_taken_before_any_merge(ours: Tokenizer, tokens: list[bytes]) -> None:
    assert ours.encode("a qwzxqk")[-1:] == [tokens.index(WHOLE_WORD)]


def test_source_code_encodes_as_in_tiktoken(
    ours: Tokenizer, theirs: tiktoken.Encoding, texts: list[str]
) -> None:
    for text in texts:
        assert ours.encode(text) == theirs.encode_ordinary(text)


words = st.sampled_from(
    ["the", "return", "Self", " qwzxqk", "aaaa", "==", "12345", "鲸鱼", "'ll", "É", "\n", " ", "🐋"]
)
any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30),
    st.lists(words, max_size=12).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_any_text_encodes_as_in_tiktoken(
    ours: Tokenizer, theirs: tiktoken.Encoding, text: str
) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode_ordinary(text)
    assert ours.decode(ids) == text


@pytest.mark.parametrize("has_merges", [True, False])
def test_gguf_keeps_it(ours: Tokenizer, texts: list[str], has_merges: bool) -> None:
    """llama.cpp's files of Kimi-K2 may have no merges."""
    metadata = tokenizer_metadata(ours, ours.vocab_size + 5)
    assert metadata[PRE] == "kimi-k2"
    assert WHOLE not in metadata
    if not has_merges:
        del metadata[MERGES]
    again = tokenizer_of(metadata, Path("kimi.gguf"))
    assert again.special_ids == ours.special_ids
    assert again.encode(texts[0]) == ours.encode(texts[0])
    del metadata[KINDS]
    with pytest.raises(TokenizerError, match="do not belong together"):
        tokenizer_of(metadata, Path("kimi.gguf"))


def test_what_is_saved_is_the_same(ours: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(texts[0]) == ours.encode(texts[0])


TWICE = {"added_tokens_decoder": {"600": {"content": "x"}, "601": {"content": "x"}}}
LONG_ID = {"9" * 5000: {"content": "x"}}
ODD_NAMES = [{"name": ["x"], "template": 3}, {"name": "default", "template": 3}]
BROKEN: list[tuple[str, Any, str, str]] = [
    ("tiktoken.model", b"IQ== 0\nIg== 2\n", "line 2 is not the next token", "restore"),
    ("tiktoken.model", b"IQ== 0\n!!! 1\n", "line 2 is not the next token", "restore"),
    ("tiktoken.model", b"IQ== 0\nIQ== 1\n", "a token twice", "restore"),
    ("tiktoken.model", b"IQ== 0\n", "do not belong together|byte tokens", ""),
    ("tiktoken.model", b"version https://git-lfs.github.com/spec/v1\n", "pointer", "git lfs pull"),
    ("tiktoken.model", b"IQ== 0\n" + b"A" * 40_000 + b" 1\n", "too long to be one", "restore"),
    ("tokenizer_config.json", {"added_tokens_decoder": LONG_ID}, "without an id", "restore"),
    ("tokenizer_config.json", {"chat_template": ODD_NAMES}, "not text", ""),
    ("tokenizer_config.json", {"tokenizer_class": "QWen"}, "QWen", "tokenizer.json"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "x"}}}, "belong", "copy"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "without an id", "restore"),
    ("tokenizer_config.json", TWICE, "has one name twice", "restore"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said", "mend"), BROKEN)
def test_a_broken_file_is_named(
    folder: Path, name: str, content: Any, said: str, mend: str, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert mend in str(caught.value.fix)
    assert str(tmp_path) in str(caught.value.where)
