"""Places for one kind of work on the event loop, shared alike by whoever has work."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairPlaces:
    """`num_places` places: a free one goes to the owner who waits and has fewest; among equals to
    who waits, or had a turn, longest ago; among one owner's to who waits longest.
    """

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._taken: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def one(self, owner: str) -> AsyncIterator[None]:
        """A place while the block runs. Whoever is cancelled while it waits has none."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._hand_out()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._give_back(owner)
            else:
                self._leave(owner, turn)

    def _hand_out(self) -> None:
        while self._num_free and self._waiting:
            owner = min(self._waiting, key=self._taken.__getitem__)
            turn = self._waiting[owner].popleft()
            self._waiting.move_to_end(owner)
            self._forget(owner)
            if not turn.cancelled():
                self._num_free -= 1
                self._taken[owner] += 1
                turn.set_result(None)

    def _give_back(self, owner: str) -> None:
        self._num_free += 1
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]
        self._hand_out()

    def _leave(self, owner: str, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting.get(owner, ()):
            self._waiting[owner].remove(turn)
            self._forget(owner)

    def _forget(self, owner: str) -> None:
        if not self._waiting.get(owner, True):
            del self._waiting[owner]
