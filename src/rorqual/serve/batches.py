"""Offline batches: every line of an uploaded file is a request; the answers make another file.

Lines are checked before any runs. A few run side by side, shared alike by the keys that have
batches, and give way to the queue: when it is full they wait. Each answer is stored as it comes,
and the files of the answers, in the order of the lines, are made at the end, so a batch goes on
where it was, however its server ended. A batch that is cancelled or fails keeps what it has.

Servers that share a folder share the batches: each is run by one, and what a server leaves behind
that has ended, another takes over that serves the same model.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from rorqual.log import logger
from rorqual.serve.batch_job import Job, Places
from rorqual.serve.errors import ApiError
from rorqual.serve.fair_places import FairPlaces
from rorqual.serve.schemas_batches import BatchReply, BatchRequest
from rorqual.serve.service import Service
from rorqual.serve.store import BatchRow, Page, StorageError, Store, ordered_id

log = logger("serve")

MAX_BATCHES = 1000
LOOK_SECONDS = 5.0


class Batches:
    """All batches of the store, and the jobs of this server among them."""

    def __init__(self, service: Service, store: Store) -> None:
        self._service, self._store = service, store
        self._table, self._database, self._me = store.batches, store.database, store.presence.name
        self._jobs: dict[str, Job] = {}
        self._places = Places(
            lines=FairPlaces(service.settings.batch_concurrency),
            files=FairPlaces(1),  # requests need threads too
        )
        self._keeper: asyncio.Task[None] | None = None
        self._waiting: set[str] = set()
        self._trouble: str | None = None

    async def start(self) -> None:
        """Takes over what ended servers left, now and from time to time."""
        await self.look_after()
        self._keeper = asyncio.create_task(self._keep_looking())

    async def create(self, body: BatchRequest, owner: str) -> BatchReply:
        """Starts a batch; ApiError 404 without the input file, 429 if there are too many."""
        file = await self._store.files.get(body.input_file_id, owner)
        if file.purpose != "batch":
            text = f"the file's purpose is {file.purpose!r}; a batch needs one of purpose 'batch'"
            raise ApiError(400, text, code="invalid_value", param="input_file_id")
        expiry = body.output_expires_after
        row = BatchRow(
            reply=BatchReply(
                id=ordered_id("batch_"),
                endpoint=body.endpoint,
                model=self._service.model.name,
                input_file_id=body.input_file_id,
                completion_window=body.completion_window,
                status="validating",
                created_at=self._now(),
                metadata=body.metadata,
            ),
            owner=owner,
            model=self._service.model.name,
            runner=self._me,
            output_seconds=None if expiry is None else expiry.seconds,
        )
        await self._database.run(
            lambda connection: self._table.insert(connection, row, MAX_BATCHES)
        )
        self._begin(row)
        return row.reply

    async def page(self, owner: str, page: Page) -> tuple[list[BatchReply], bool]:
        """An owner's batches, and whether there are more."""
        return await self._database.read(
            lambda connection: self._table.page(connection, owner, page)
        )

    async def get(self, batch_id: str, owner: str) -> BatchReply:
        """ApiError 404 for an id that is not there or not the owner's."""
        row = await self._database.read(
            lambda connection: self._table.get(connection, batch_id, owner)
        )
        return row.reply

    async def cancel(self, batch_id: str, owner: str) -> BatchReply:
        """Ends a running batch soon; one that has ended stays as it is."""
        now = self._now()
        row = await self._database.run(
            lambda connection: self._table.cancel(connection, batch_id, owner, now)
        )
        if row.reply.status == "cancelling":
            if (job := self._jobs.get(batch_id)) is not None:
                job.is_cancelled = True
            else:  # its server will see it, if it lives
                await self.look_after()
        return row.reply

    async def look_after(self) -> None:
        """Sees what other servers did: cancels of our batches, and batches that they left."""
        if self._service.is_draining:
            return
        for row in await self._database.read(self._table.running):
            job = self._jobs.get(row.reply.id)
            if row.runner == self._me:
                if job is not None:
                    job.is_cancelled |= row.reply.status == "cancelling"
                continue
            if job is not None:
                job.is_stopped = True  # it is not ours any more
            elif await self._may_take(row):
                await self._take(row)
        await asyncio.to_thread(self._store.clean)

    async def drain(self) -> None:
        """Waits for the lines that run; the others are not begun any more."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """What has not ended is left to whoever starts next."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        for job in self._jobs.values():
            if job.task is not None:
                job.task.cancel()
        await self.drain()
        with suppress(StorageError):  # logged; and nobody will take us for alive
            await self._database.run(lambda connection: self._table.release(connection, self._me))

    def _now(self) -> int:
        return int(self._store.clock())

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look_after()
                self._trouble = None
            except (StorageError, OSError) as problem:
                if self._is_news(problem):
                    log.error("batches are not looked after: %s", problem)
            except Exception as problem:  # the next look may go well
                if self._is_news(problem):
                    log.error("looking after batches failed: %s", problem, exc_info=problem)

    def _is_news(self, problem: Exception) -> bool:
        before, self._trouble = self._trouble, repr(problem)
        return self._trouble != before

    async def _may_take(self, row: BatchRow) -> bool:
        is_ours = row.model in self._service.model.names
        if not is_ours and row.reply.status != "cancelling":  # to end one needs no model
            if row.reply.id not in self._waiting:
                self._waiting.add(row.reply.id)
                log.info("batch %s waits for a server of model %r", row.reply.id, row.model)
            return False
        gone = self._store.presence.is_gone
        return row.runner is None or await asyncio.to_thread(gone, row.runner)

    async def _take(self, row: BatchRow) -> None:
        taken = await self._database.run(
            lambda connection: self._table.take(connection, row, self._me)
        )
        if taken is not None:  # no other server was quicker
            log.info("batch %s goes on", row.reply.id)
            self._begin(taken)

    def _begin(self, row: BatchRow) -> None:
        job = self._jobs[row.reply.id] = Job(self._service, self._store, row, self._places)

        async def run() -> None:
            try:
                await job.run()
            finally:
                del self._jobs[row.reply.id]

        job.task = asyncio.create_task(run())
