"""The tokenizer: text to ids and back, conversations to ids, and the folder that holds it.

Ordinary text never yields a special id: `tokenizers` works here on the vocabulary without its
added tokens, and the special ids are put in by name. So a document or a user that quotes
`<｜Assistant｜>` is tokenised as those characters, with no scan for them (V3's own vocabulary does
the same only for tokens flagged `special`, which `<｜Assistant｜>` is not).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import TokenizerError
from rorqual.files import atomic_write, write_json
from rorqual.tokenizer import special as names
from rorqual.tokenizer.chat import Message, render
from rorqual.tokenizer.stream import StreamDecoder
from rorqual.tokenizer.templates import has_thinking_switch

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A byte-level BPE with special tokens and a chat template; made by `load_tokenizer` and kin.

    `special_ids` maps every special token to its id. `token_bytes` holds each id's bytes, so its
    length is the number of ids that exist: the model's rows beyond it are never to be sampled.
    `definition` is the text of `tokenizer.json`.
    """

    plain: tokenizers.Tokenizer
    token_bytes: tuple[bytes, ...]
    special_ids: dict[str, int]
    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: str
    definition: str = field(repr=False)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, specials={len(self.special_ids)})"

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included; they are 0 .. vocab_size - 1."""
        return len(self.token_bytes)

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes, and so characters, that a token holds at most."""
        return max(map(len, self.token_bytes))

    @functools.cached_property
    def byte_ids(self) -> dict[int, int]:
        """Of each byte the id of the token that is nothing else."""
        special = set(self.special_ids.values())
        singles = ((i, text) for i, text in enumerate(self.token_bytes) if len(text) == 1)
        return {text[0]: token_id for token_id, text in singles if token_id not in special}

    @property
    def bos_id(self) -> int:
        return self.special_ids[self.bos_token]

    @property
    def eos_id(self) -> int:
        return self.special_ids[self.eos_token]

    @property
    def pad_id(self) -> int:
        return self.special_ids[self.pad_token]

    @property
    def fim_hole_id(self) -> int | None:
        return self.special_ids.get(names.FIM_HOLE)

    @property
    def fim_begin_id(self) -> int | None:
        return self.special_ids.get(names.FIM_BEGIN)

    @property
    def fim_end_id(self) -> int | None:
        return self.special_ids.get(names.FIM_END)

    @property
    def user_id(self) -> int | None:
        return self.special_ids.get(names.USER)

    @property
    def assistant_id(self) -> int | None:
        return self.special_ids.get(names.ASSISTANT)

    @property
    def has_thinking_switch(self) -> bool:
        """Whether the chat template can be told to think or not; others leave `thinking` unread."""
        return has_thinking_switch(self.chat_template)

    def encode(self, text: str, bos: bool = False, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, after the begin-of-sentence id with `bos`.

        With `allow_special` the names of special tokens in the text become their ids: only for
        text that you wrote yourself, such as a raw prompt.
        """
        if not allow_special:
            return self.encode_batch([text], bos)[0]
        first = [self.bos_id] if bos else []
        return first + self._encode_marked(text, mark="")

    def encode_raw(self, text: str, *, bos: bool = True, reads_special: bool = False) -> list[int]:
        """Ids of a prompt that somebody wrote whole: with `bos` a begin-of-sentence, then the text.

        With `reads_special` the names of special tokens in it become their ids, in this
        tokenizer's writing or with `|` and `_` of a keyboard; a begin-of-sentence that it has stays
        the only one.
        """
        if not reads_special:
            return self.encode(text, bos)
        ids = self.encode(self._loose_names.sub(self._name_of, text), allow_special=True)
        return ids if not bos or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def names_special(self, text: str) -> bool:
        """Whether `encode_raw` finds names of special tokens in the text."""
        return self._loose_names.search(text) is not None

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, on the threads of `tokenizers`; no special ids."""
        try:
            encodings = self.plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise _unencodable(texts) from None
        first = [self.bos_id] if bos else []
        return [first + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; special tokens show as their names, or are left out.

        Bytes that are no UTF-8 become U+FFFD. TokenizerError for an id that does not exist.
        """
        take = self.bytes_of_text if skip_special else self.bytes_of
        return b"".join([take(token_id) for token_id in ids]).decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one by one; its parts joined equal `decode`."""
        return StreamDecoder(self.bytes_of_text if skip_special else self.bytes_of)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one id; a special token's are its name in UTF-8."""
        if not 0 <= token_id < len(self.token_bytes):
            raise TokenizerError(
                "no such token id",
                found=token_id,
                expected=f"0 to {self.vocab_size - 1}",
                fix="mask the logits from tokenizer.vocab_size on before sampling",
            )
        return self.token_bytes[token_id]

    def bytes_of_text(self, token_id: int) -> bytes:
        """As `bytes_of`, but nothing for a special token."""
        return b"" if token_id in self._special_id_set else self.bytes_of(token_id)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> str:
        """The prompt as text, from the begin-of-sentence token on: for people and comparisons.

        `tools` are definitions in OpenAI's shape. A last assistant message with `prefix: true` is
        left open. `thinking` turns reasoning on or off where the template has a switch; None leaves
        it to the template. For the model use `encode_chat`, which knows whose special tokens are
        whose.
        """
        text, mark = self._render(messages, tools, add_generation_prompt, thinking)
        return text.replace(mark, "")

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> list[int]:
        """Ids of the prompt; special tokens quoted in messages or tools stay ordinary text.

        Only `<think>` and `</think>` in an assistant's content become their ids (see `chat.py`).
        """
        return self._encode_marked(*self._render(messages, tools, add_generation_prompt, thinking))

    def encode_training(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a whole conversation; mask is 1 where the assistant speaks.

        That is all it writes: content, tool calls and the end-of-sentence, but not the tokens that
        hand it the turn. The ids are those of `encode_chat(add_generation_prompt=False)`.
        """
        if self.assistant_id is None:
            raise TokenizerError(
                "cannot tell the assistant's tokens from the rest",
                found=f"no token {names.ASSISTANT}",
                fix="train on plain text instead",
            )
        ids = self.encode_chat(messages, tools, add_generation_prompt=False)
        # The special ids are the template's own, so they mark the turns exactly.
        handing_over = {self.assistant_id, self.special_ids.get(names.TOOL_OUTPUTS_END)}
        taking_back = {self.user_id, self.bos_id}
        mask = []
        is_speaking = False
        for token_id in ids:
            is_speaking = is_speaking and token_id not in taking_back
            mask.append(int(is_speaking))
            if token_id in handing_over:
                is_speaking = True
            elif token_id == self.eos_id:
                is_speaking = False
        return ids, mask

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` for us and for transformers."""
        folder = Path(folder)
        with atomic_write(folder / "tokenizer.json", "w") as file:
            file.write(self.definition)
        # transformers prefers this file to the template in the configuration: no stale one stays.
        template_file = folder / "chat_template.jinja"
        if template_file.exists():
            with atomic_write(template_file, "w") as file:
                file.write(self.chat_template)
        # Choice: add_bos_token false, as V3 has it, since the chat template writes BOS itself; the
        # class is transformers' plain reader, as its Llama class would replace the pre-tokenizer.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "unk_token": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        write_json(folder / "tokenizer_config.json", config)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        thinking: bool | None,
    ) -> tuple[str, str]:
        return render(
            self.chat_template,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            thinking=thinking,
            special=self._special_pattern,
            names={
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "pad_token": self.pad_token,
            },
        )

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Special names become ids; between them `mark` is removed and the rest is plain text."""
        pieces = self._special_pattern.split(text)
        plain = [piece.replace(mark, "") if mark else piece for piece in pieces[::2]]
        ids = []
        for index, encoded in enumerate(self.encode_batch(plain)):
            ids += encoded
            if 2 * index + 1 < len(pieces):
                ids.append(self.special_ids[pieces[2 * index + 1]])
        return ids

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @functools.cached_property
    def _loose_names(self) -> re.Pattern[str]:
        """The special tokens' names, however their bars and word marks are typed."""
        patterns = [
            re.sub("[｜|]", "[｜|]", re.sub("[▁_]", "[▁_]", re.escape(name).replace(r"\|", "|")))
            for name in sorted(self.special_ids, key=len, reverse=True)
        ]
        return re.compile("|".join(patterns))

    def _name_of(self, match: re.Match[str]) -> str:
        return match[0] if match[0] in self.special_ids else self._names_by_loose[_loose(match[0])]

    @functools.cached_property
    def _names_by_loose(self) -> dict[str, str]:
        return {_loose(name): name for name in self.special_ids}

    @functools.cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Tokens that begin, end and fill texts: what others' `skip_special_tokens` drops."""
        hidden = {*names.HIDDEN_SPECIALS, self.bos_token, self.eos_token, self.pad_token}
        return frozenset(self.special_ids[name] for name in hidden if name in self.special_ids)

    @functools.cached_property
    def _special_id_set(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())


def _loose(name: str) -> str:
    return name.replace("｜", "|").replace("▁", "_")


def _unencodable(texts: Sequence[str]) -> TokenizerError:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return TokenizerError(
                "is not text", where=f"texts[{index}]", found=type(text).__name__, expected="str"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            return TokenizerError(
                "holds half of a surrogate pair, which is no text",
                where=f"texts[{index}], character {problem.start}",
                found=ascii(text[problem.start]),
                fix="decode the source with errors='replace'",
            )
    return TokenizerError("the texts cannot be encoded", expected="a sequence of str")
