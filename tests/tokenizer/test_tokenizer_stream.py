"""Oracle: `bytes.decode` of the whole text, and U+FFFD never where whole characters were sent."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tokenizer import StreamDecoder, Tokenizer

pieces = st.one_of(
    st.binary(max_size=6),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(str.encode),
    st.sampled_from(["👩‍👩‍👧", "深度求索", "é", "🏴‍☠️", "\ufffd"]).map(str.encode),
)


def stream_bytes(data: bytes) -> list[str]:
    decoder = StreamDecoder(lambda byte: bytes([byte]))
    return [*map(decoder.put, data), decoder.finish()]


@settings(max_examples=300, deadline=None)
@given(data=st.lists(pieces, max_size=8).map(b"".join))
def test_any_bytes_join_to_their_decoding(data: bytes) -> None:
    assert "".join(stream_bytes(data)) == data.decode("utf-8", errors="replace")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_each_part_is_whole_characters(text: str) -> None:
    parts = stream_bytes(text.encode())
    assert "".join(parts) == text
    assert [part for part in parts if part] == list(text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 599), max_size=30))
def test_any_ids_join_to_their_decoding(small: Tokenizer, ids: list[int]) -> None:
    for skip_special in (False, True):
        stream = small.stream(skip_special=skip_special)
        streamed = "".join(map(stream.put, ids)) + stream.finish()
        assert streamed == small.decode(ids, skip_special=skip_special)


def test_a_character_over_several_tokens_comes_at_once(small: Tokenizer) -> None:
    ids = small.encode("🏴")
    assert len(ids) > 1
    stream = small.stream()
    assert [stream.put(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🏴"]
    assert stream.finish() == ""


def test_a_character_cut_off_is_shown_once_and_forgotten(small: Tokenizer) -> None:
    stream = small.stream()
    assert stream.put(small.encode("🏴")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.put(small.encode("a")[0]) == "a"


def test_a_long_stream_takes_linear_time(small: Tokenizer) -> None:
    def seconds(num_tokens: int) -> float:
        stream = small.stream()
        start = time.thread_time()
        for _ in range(num_tokens):
            stream.put(50)
        return time.thread_time() - start

    # Time of this thread on a processor. Quadratic time would make this 16.
    assert min(seconds(80_000) for _ in range(3)) < 10 * min(seconds(20_000) for _ in range(3))
