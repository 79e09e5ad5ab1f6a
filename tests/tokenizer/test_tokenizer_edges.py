"""Edges of the tokenizer's files, templates, special names and calls. Oracles: what is written out
here by hand, and Python's own JSON.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import TokenizerError
from rorqual.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from rorqual.tokenizer.load import has_tokenizer
from rorqual.tokenizer.marks import SEP
from rorqual.tokenizer.tiktoken import MAX_TOKEN_BYTES, merges_of, tiktoken_definition
from rorqual.tokenizer.tool_calls import CallHeader, read_call_header
from rorqual.tokenizer.train import MIN_VOCAB_SIZE

HI = [{"role": "user", "content": "Hi"}]


def test_the_longest_special_name_wins(small: Tokenizer) -> None:
    """Of names that begin alike, however they are ordered."""
    for names in (["<a>", "<a>b", "<a>bc"], ["<a>bc", "<a>b", "<a>"]):
        ids = {name: number for number, name in enumerate(names)}
        changed = dataclasses.replace(small, special_ids={**small.special_ids, **ids})
        for name, token_id in ids.items():
            assert changed.encode(name, allow_special=True) == [token_id], names


def test_templates_are_laid_out_as_in_transformers(small: Tokenizer) -> None:
    """Blocks take their line's end and the blanks before them; loops may end early; JSON keeps
    letters and the order of keys.
    """
    template = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}\n{% break %}\n{% endif %}\n"
        "a{{ m.content }}\n{% endfor %}\n{{ {'z': 'ü<Hi', 'Hi': 1} | tojson }}"
    )
    changed = dataclasses.replace(small, chat_template=template)
    assert changed.render_chat(HI * 3) == 'aHi\n{"z": "ü<Hi", "Hi": 1}'


def test_a_template_may_refuse_with_its_own_words(small: Tokenizer) -> None:
    changed = dataclasses.replace(small, chat_template="{{ raise_exception('only twins') }}")
    with pytest.raises(TokenizerError, match="failed: only twins"):
        changed.render_chat(HI)


def test_names_of_the_tokens_are_the_templates(small: Tokenizer) -> None:
    template = (
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ add_generation_prompt }}|"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    changed = dataclasses.replace(small, chat_template=template)
    expected = f"{small.bos_token}|{small.eos_token}|{small.pad_token}"
    assert changed.render_chat(HI) == f"{expected}|True|Hi"
    assert changed.render_chat(HI, add_generation_prompt=False) == f"{expected}|False|Hi"
    begun = [*HI, {"role": "assistant", "content": "A", "prefix": True}]
    assert changed.render_chat(begun) == f"{expected}|False|HiA"


@pytest.mark.parametrize("last", ["system", "tool"])
def test_a_system_message_may_stand_between_a_call_and_its_output(
    small: Tokenizer, last: str
) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "system", "content": "S"},
        {"role": "tool", "content": "1"},
        {"role": last, "content": "2"},
    ]
    assert small.render_chat(messages).startswith(f"{small.bos_token}S")


def files(folder: Path, small: Tokenizer, **changes: Any) -> Path:
    small.save(folder)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(definition | changes), encoding="utf-8")
    return folder


def test_texts_are_neither_cut_nor_filled(small: Tokenizer, tmp_path: Path) -> None:
    """Though the file says so: what reads a corpus wants all of it."""
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": small.pad_token,
    }  # fmt: skip
    loaded = load_tokenizer(files(tmp_path, small, truncation=cut, padding=fill))
    for text in ("a", "one two three four five six"):
        assert loaded.encode(text) == small.encode(text)


def test_without_a_pad_token_it_is_the_end(small: Tokenizer, tmp_path: Path) -> None:
    files(tmp_path, small)
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in definition["added_tokens"]:
        token["content"] = "<pad>" if token["id"] == small.pad_id else token["content"]
    vocab = definition["model"]["vocab"]
    if small.pad_token in vocab:
        vocab["<pad>"] = vocab.pop(small.pad_token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = load_tokenizer(tmp_path)
    assert (loaded.pad_token, loaded.pad_id) == (small.eos_token, small.eos_id)


def test_tokenizer_json_comes_before_tiktoken(small: Tokenizer, tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").write_text("broken")
    assert has_tokenizer(tmp_path)
    small.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("Hi") == small.encode("Hi")
    (tmp_path / "tiktoken.model").unlink()
    assert has_tokenizer(tmp_path)


def test_the_default_of_named_templates(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = [{"name": name, "template": f"{{# {name} #}}"} for name in ("rag", "default", "tool")]
    for templates, expected in ((named, "{# default #}"), (named[:1], small.chat_template)):
        text = json.dumps(config | {"chat_template": templates})
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        assert load_tokenizer(tmp_path).chat_template == expected


def ranks(folder: Path, config: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tiktoken.model").write_text("\n\n".join(lines) if text is None else text)
    return tiktoken_definition(folder / "tiktoken.model", config)


@pytest.mark.parametrize(("place", "is_near"), [(2559, True), (2560, False), (-1, False)])
def test_special_ids_lie_within_reach_of_the_tokens(
    tmp_path: Path, place: int, is_near: bool
) -> None:
    """Ten times the 256 reserved ones; blank lines of the file are nothing."""
    config = {"added_tokens_decoder": {str(256 + place): {"content": "<x>"}}}
    if not is_near:
        with pytest.raises(TokenizerError, match="do not belong together"):
            ranks(tmp_path, config)
        return
    added = ranks(tmp_path, config)["added_tokens"]
    assert [token["id"] for token in added] == list(range(256, 256 + place + 1))
    assert added[-1]["content"] == "<x>"


def test_without_names_there_are_256_reserved_ids(tmp_path: Path) -> None:
    added = ranks(tmp_path, {"added_tokens_decoder": None})["added_tokens"]
    assert [token["content"] for token in added] == [
        f"<|reserved_token_{i}|>" for i in range(256, 512)
    ]


@pytest.mark.parametrize("token", [["x"], None, {"content": ""}, {"content": 3}])
def test_an_added_token_has_a_name(tmp_path: Path, token: Any) -> None:
    with pytest.raises(TokenizerError, match="without an id or a name"):
        ranks(tmp_path, {"added_tokens_decoder": {"300": token}})


def test_the_longest_token_may_be_so_long() -> None:
    assert merges_of(["a", "a" * MAX_TOKEN_BYTES], "here") == []
    assert merges_of(["a", "aa", "aaa"], "here") == [("a", "a"), ("a", "aa"), ("aa", "a")]
    with pytest.raises(TokenizerError, match="too long to be one"):
        merges_of(["a" * (MAX_TOKEN_BYTES + 1)], "here")


def test_the_least_vocabulary_and_the_least_frequency() -> None:
    """276 tokens hold no merge; a pair seen once is none, one seen twice is."""
    assert MIN_VOCAB_SIZE == 276
    assert train_tokenizer(["abab"] * 9, 276).vocab_size == 276
    assert train_tokenizer(["ab"], 300).vocab_size == 276
    assert train_tokenizer(["ab ab"], 300).vocab_size > 276


FENCE = "\n```json\n"
HEAD = f"function{SEP}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "open"),
        ("func", "open"),
        ("  ", "open"),
        ("f\ng", "none"),
        ("f" * 257, "none"),
        (SEP, "none"),
        (HEAD, "open"),
        (f"{HEAD} ", "open"),
        (f"{HEAD}get", "open"),
        (f"{HEAD}get{FENCE[:-1]}", "open"),
        (f"{HEAD}get{FENCE}", "open"),
        (f"{HEAD}get{FENCE} ``", "open"),
        (f"{HEAD}get\n```x", "open"),
        (f"{HEAD}{FENCE}", "none"),
        (f"{HEAD}{'f' * 257}", "none"),
        (f"f{SEP}", "open"),
        (f"f{SEP}x", CallHeader("f", 2, is_exact=False)),
        (f"{HEAD}get{FENCE}{{", CallHeader("get", len(HEAD) + 3 + len(FENCE), is_exact=True)),
        (f"{HEAD} get {FENCE} [", CallHeader("get", len(HEAD) + 5 + len(FENCE), is_exact=True)),
        (f"{HEAD}get \n``` json{{", CallHeader("get", len(HEAD) + 13, is_exact=False)),
        (f" f {SEP} {{}}", CallHeader("f", 5, is_exact=False)),
        (f"{HEAD} {{}}", CallHeader("function", len(HEAD) + 1, is_exact=False)),
    ],
)
def test_what_a_stream_is_so_far(text: str, found: Any) -> None:
    assert read_call_header(text, is_whole=False) == found
    whole = read_call_header(text, is_whole=True)
    assert whole != "open"
    if found != "open":  # more text does not change it
        assert whole == found
        assert read_call_header(f"{text}{{}}\n```", is_whole=True) == found
