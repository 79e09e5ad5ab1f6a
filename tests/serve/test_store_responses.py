"""Stored responses. Oracle: the rules of their owners, their order and their end, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import DAY, Clock, opened

from rorqual.serve.errors import ApiError
from rorqual.serve.store import ResponseStore, Store, StoredResponse
from rorqual.serve.store import responses as response_table


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    limits = {"max_stored_responses": 4, "max_stored_response_bytes": 100}
    with opened(tmp_path, clock, response_seconds=DAY, **limits) as store:
        yield store


@pytest.fixture
def responses(store: Store) -> ResponseStore:
    return store.responses


def put(responses: ResponseStore, name: str, body: str = "{}", **fields: Any) -> None:
    values = {"id": name, "owner": "me", "body": body} | fields
    asyncio.run(responses.put(StoredResponse(**values)))


def ask(work: Callable[[], Any]) -> tuple[int, str | None, str | None]:
    with pytest.raises(ApiError) as caught:
        asyncio.run(work())
    return caught.value.status, caught.value.code, caught.value.param


def kept(responses: ResponseStore, *names: str, owner: str = "me") -> list[str]:
    found = []
    for name in names:
        try:
            found.append(asyncio.run(responses.get(name, owner)).id)
        except ApiError as problem:
            if problem.code != "response_not_found":
                raise
    return found


def test_what_is_put_comes_back_to_its_owner_alone(responses: ResponseStore) -> None:
    put(responses, "a", '{"text": "鯨"}', previous_id="z")
    whole = StoredResponse(id="a", owner="me", body='{"text": "鯨"}', previous_id="z")
    assert asyncio.run(responses.get("a", "me")) == whole
    not_found = (404, "response_not_found", "response_id")
    assert ask(lambda: responses.get("a", "other")) == not_found
    assert ask(lambda: responses.delete("a", "other")) == not_found
    asyncio.run(responses.delete("a", "me"))
    assert ask(lambda: responses.delete("a", "me")) == not_found


def test_the_later_one_of_an_id_counts(responses: ResponseStore) -> None:
    put(responses, "a", "1")
    put(responses, "a", "2")
    assert asyncio.run(responses.get("a", "me")).body == "2"


def test_a_chain_is_told_from_its_beginning(responses: ResponseStore) -> None:
    put(responses, "a")
    put(responses, "b", previous_id="a")
    put(responses, "c", previous_id="b")
    put(responses, "d", previous_id="b", owner="other")
    chain = asyncio.run(responses.chain("c", "me"))
    assert [response.id for response in chain] == ["a", "b", "c"]
    gone = (400, "previous_response_not_found", "previous_response_id")
    assert ask(lambda: responses.chain("d", "other")) == gone  # b is not theirs
    assert ask(lambda: responses.chain("x", "me")) == gone
    asyncio.run(responses.delete("a", "me"))
    assert ask(lambda: responses.chain("c", "me")) == gone


def test_a_chain_that_lost_a_response_is_told_by_the_id_that_was_sent(
    responses: ResponseStore,
) -> None:
    put(responses, "a")
    put(responses, "b", previous_id="a")
    put(responses, "c", previous_id="b")
    asyncio.run(responses.delete("a", "me"))
    for sent in ("c", "b"):
        with pytest.raises(ApiError, match=f"conversation of '{sent}' is not whole.*'a' was dele"):
            asyncio.run(responses.chain(sent, "me"))
    with pytest.raises(ApiError, match="there is no previous response 'a'"):
        asyncio.run(responses.chain("a", "me"))


@pytest.mark.parametrize("excess", [0, 1])
def test_a_chain_has_a_limit(
    responses: ResponseStore, monkeypatch: pytest.MonkeyPatch, excess: int
) -> None:
    monkeypatch.setattr(response_table, "MAX_CHAIN", 3 - excess)
    for name, previous in (("a", None), ("b", "a"), ("c", "b")):
        put(responses, name, previous_id=previous)
    if excess:
        assert ask(lambda: responses.chain("c", "me"))[0] == 400
    else:
        assert len(asyncio.run(responses.chain("c", "me"))) == 3


def test_a_circle_ends(responses: ResponseStore) -> None:
    put(responses, "a", previous_id="b")
    put(responses, "b", previous_id="a")
    assert ask(lambda: responses.chain("a", "me"))[0] == 400


def test_a_chain_has_a_length_in_bytes(
    responses: ResponseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rorqual.serve.store import responses as module

    monkeypatch.setattr(module, "MAX_CHAIN_BYTES", 20)
    put(responses, "a", "1234567890")
    put(responses, "b", "1234567890", previous_id="a")
    put(responses, "c", "1", previous_id="b")
    assert len(asyncio.run(responses.chain("b", "me"))) == 2
    too_long = (400, "context_length_exceeded", "previous_response_id")
    assert ask(lambda: responses.chain("c", "me")) == too_long


def test_responses_expire(store: Store, responses: ResponseStore, clock: Clock) -> None:
    put(responses, "a")
    clock.advance(DAY - 1)
    put(responses, "b", previous_id="a")
    store.clean()
    assert kept(responses, "a", "b") == ["a", "b"]
    clock.advance(1)
    assert kept(responses, "a", "b") == ["b"]  # before anybody cleans
    assert ask(lambda: responses.chain("b", "me"))[0] == 400
    store.clean()
    [row] = store.database.rows("SELECT id FROM responses")
    assert row["id"] == "b"


def test_who_has_the_most_makes_room(responses: ResponseStore) -> None:
    """A flood costs its owner the oldest, and nobody else anything."""
    put(responses, "mine", "1234")
    for name in "abcde":
        put(responses, name, "12345", owner="flood")
    assert kept(responses, "mine") == ["mine"]
    assert kept(responses, *"abcde", owner="flood") == ["c", "d", "e"]
    put(responses, "long", "x" * 90, owner="flood")  # bytes count as well
    assert kept(responses, "mine") == ["mine"]
    assert kept(responses, *"cde", "long", owner="flood") == ["e", "long"]
    too_large = (413, "response_too_large", "store")
    response = StoredResponse(id="huge", owner="me", body="x" * 101)
    assert ask(lambda: responses.put(response)) == too_large
    assert kept(responses, "mine") == ["mine"]


def test_responses_last(store: Store, responses: ResponseStore, tmp_path: Path) -> None:
    put(responses, "a", "1")
    store.close()
    with opened(tmp_path, Clock()) as again:
        assert asyncio.run(again.responses.get("a", "me")).body == "1"
