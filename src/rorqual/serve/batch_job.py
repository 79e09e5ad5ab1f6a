"""The life of a batch in the server that runs it: check its lines, answer them, end it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rorqual.log import logger
from rorqual.serve.batch_lines import FileCheck, Lines, record_of
from rorqual.serve.chat import collect_chat
from rorqual.serve.completions import collect_completion
from rorqual.serve.errors import (
    ENGINE_FAILED,
    INTERNAL,
    ApiError,
    overloaded,
    validation_error,
)
from rorqual.serve.fair_places import FairPlaces
from rorqual.serve.fair_pool import Caller
from rorqual.serve.json_values import check_repeatable, is_suspect
from rorqual.serve.responses import collect_response
from rorqual.serve.schemas_batches import (
    BatchError,
    BatchErrors,
    BatchLine,
    BatchReply,
    Endpoint,
)
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.schemas_responses import ResponseRequest
from rorqual.serve.service import Service
from rorqual.serve.store import BatchRow, LostError, NewFile, StorageError, Store

log = logger("serve")

T = TypeVar("T")

MAX_STARTS = 10
"""Servers that may end one after the other while they run a batch, without one answer between
them: then it may be the batch that ends them.
"""
FULL_QUEUE_SECONDS = 0.25
STORAGE_SECONDS = 5.0

Work = Callable[[Service, Any, Caller], Awaitable[str]]
Schema = type[ChatRequest] | type[CompletionRequest] | type[ResponseRequest]
ROUTES: Mapping[str, tuple[Schema, Work]] = {
    "/v1/chat/completions": (ChatRequest, collect_chat),
    "/v1/completions": (CompletionRequest, collect_completion),
}


@dataclass(frozen=True)
class Places:
    """How many lines are answered, and how many files checked, at once: shared by owners."""

    lines: FairPlaces
    files: FairPlaces


class Job:
    """A batch that this server runs. All jobs share its `Places`."""

    def __init__(self, service: Service, store: Store, row: BatchRow, places: Places) -> None:
        self._service, self._store, self._places = service, store, places
        self._table, self._database, self._me = store.batches, store.database, store.presence.name
        self.row, self.id = row, row.reply.id
        self._pace = f"batches of {row.owner}"  # requests of the same key need not wait for them
        self.task: asyncio.Task[None] | None = None
        self.is_cancelled = row.reply.status == "cancelling"
        self.is_stopped = False
        """It is left as it is: the engine has failed, or another server has it."""

    async def run(self) -> None:
        """Nobody awaits this task: the batch's reply tells what goes wrong."""
        try:
            faults, is_whole = await self._answer_lines()
            if faults or is_whole or self.is_cancelled:
                await self._persist(lambda: asyncio.to_thread(self._finish, faults))
        except LostError:
            log.warning("batch %s has another server", self.id)
        except StorageError:
            log.warning("batch %s goes on when the server is started again", self.id)
        except Exception as problem:  # a fault of ours: trying again would not help
            log.error("batch %s failed", self.id, exc_info=problem)
            errors = BatchErrors(data=[BatchError(code="internal_error", message=INTERNAL)])
            changes = {"status": "failed", "failed_at": int(self._store.clock()), "errors": errors}
            with suppress(LostError, StorageError):
                await self._database.run(self._changing(changes))

    async def _answer_lines(self) -> tuple[list[BatchError], bool]:
        """What makes the batch fail, and whether all lines have their answer."""
        try:
            if self.row.num_starts > MAX_STARTS:
                text = f"{MAX_STARTS} servers ended while they ran this batch"
                raise ApiError(500, text, code="no_progress")
            if self.row.reply.status == "validating":
                faults = await self._check()
                if faults is None or faults:
                    return faults or [], False
            if not self.is_cancelled:
                await self._run_lines()
        except (LostError, StorageError):
            raise
        except ApiError as problem:
            return [BatchError(code=problem.code or "failed", message=problem.message)], False
        except OSError as problem:
            log.warning("batch %s: %s", self.id, problem)
            message = "the input file cannot be read any more"
            return [BatchError(code="input_file_gone", message=message)], False
        except Exception as problem:
            log.error("batch %s failed", self.id, exc_info=problem)
            return [BatchError(code="internal_error", message=INTERNAL)], False
        row = await self._database.read(
            lambda connection: self._table.get(connection, self.id, self.row.owner)
        )
        counts = row.reply.request_counts
        return [], counts.completed + counts.failed >= counts.total

    async def _check(self) -> list[BatchError] | None:
        """What is wrong with the file; counts the lines. None: the batch is to end before."""
        reply, service = self.row.reply, self._service
        check = FileCheck(
            self._store.files.path(reply.input_file_id),
            reply.endpoint,
            service.settings.max_body_bytes,
            service.model.max_values,
        )
        while not check.is_done:
            async with self._places.files.one(self.row.owner):
                num_bytes, num_values = await asyncio.to_thread(check.go_on)
            await service.pacer.spend(self._pace, num_bytes, num_values)
            if self._is_ending():
                return None
        num_lines, faults = check.num_lines, check.faults
        counts = reply.request_counts.model_copy(update={"total": num_lines})
        changes: dict[str, Any] = {"request_counts": counts}
        if not faults:
            changes |= {"status": "in_progress", "in_progress_at": int(self._store.clock())}
        await self._persist(lambda: self._database.run(self._changing(changes)))
        return faults

    async def _run_lines(self) -> None:
        answered = await self._database.read(
            lambda connection: self._table.answered(connection, self.id)
        )
        lines = Lines(self._store.files.path(self.row.reply.input_file_id), answered)
        num_workers = self._service.settings.batch_concurrency
        await _run_all([self._work(lines) for _ in range(num_workers)])

    async def _work(self, lines: Lines) -> None:
        """Answers lines, one after the other, until there are none or the batch is to end."""
        while True:
            async with self._places.lines.one(self.row.owner):
                if self._is_ending() or (found := await lines.next()) is None:
                    return
                number, raw = found
                await self._service.pacer.turn(self._pace, raw)
                line = BatchLine.model_validate_json(raw)
                status, body, ignored = await self._answer(line, is_doubtful=is_suspect(raw))
                if status == 0:
                    return
                record = record_of(line.custom_id, status, body, ignored)
                await self._keep(number, status == 200, record)

    async def _keep(self, number: int, is_good: bool, record: bytes) -> None:
        def work(connection: sqlite3.Connection) -> bool:
            status = self._table.add_answer(connection, self.id, self._me, number, is_good, record)
            return status == "cancelling"

        self.is_cancelled |= await self._persist(lambda: self._database.run(work))

    def _finish(self, faults: list[BatchError]) -> None:
        """Makes the files of the answers and ends the batch in one transaction, in a thread."""
        files, now = self._store.files, int(self._store.clock())
        if not faults and not self.is_cancelled:
            self._database.do(self._changing({"status": "finalizing", "finalizing_at": now}))
        staged: dict[str, str] = {}
        try:
            for kind, is_good in (("output", True), ("error", False)):
                records = self._table.records(self._database, self.id, is_good)
                if (first := next(records, None)) is None:
                    continue
                new = NewFile(
                    name=f"{self.id}_{kind}.jsonl",
                    owner=self.row.owner,
                    purpose="batch_output",
                    seconds=self.row.output_seconds,
                )
                staged[kind] = files.stage(chain([first], records), new).id

            def end(connection: sqlite3.Connection) -> None:
                counts = self._table.get(connection, self.id, self.row.owner).reply.request_counts
                num_answered = counts.completed + counts.failed
                is_short = self.is_cancelled and (not counts.total or num_answered < counts.total)
                status = "failed" if faults else "cancelled" if is_short else "completed"
                changes: dict[str, Any] = {
                    "status": status,
                    f"{status}_at": int(self._store.clock()),
                }
                changes |= {f"{kind}_file_id": file_id for kind, file_id in staged.items()}
                if faults:
                    changes["errors"] = BatchErrors(data=faults)
                self._table.change(connection, self.id, self._me, **changes)
                for file_id in staged.values():
                    files.show(connection, file_id)

            self._database.do(end)
        except BaseException:
            for file_id in staged.values():
                files.drop(file_id)
            raise
        with suppress(StorageError):  # logged; the next start forgets them
            self._store.forget(self.id)

    def _changing(self, changes: Mapping[str, Any]) -> Callable[[sqlite3.Connection], BatchReply]:
        return lambda connection: self._table.change(connection, self.id, self._me, **changes)

    async def _persist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does it again as long as the disk is full or fails: the batch waits and loses nothing."""
        while True:
            try:
                return await work()
            except StorageError as problem:
                if problem.status != 503 or self._service.is_draining:
                    self.is_stopped = True
                    raise
            except LostError:
                self.is_stopped = True
                raise
            await asyncio.sleep(STORAGE_SECONDS)

    async def _answer(self, line: BatchLine, *, is_doubtful: bool) -> tuple[int, str, list[str]]:
        """(status, JSON, names of fields without effect) of one request; status 0 if the batch
        ended before there was room for it.
        """
        schema, work = self._route(line.url)
        try:
            if is_doubtful:
                check_repeatable(line.body)
            body = schema.model_validate(line.body)
            if body.stream:
                raise ApiError(422, "a batch cannot stream", code="unsupported", param="stream")
            return 200, await self._patiently(work, body), body.notes.ignored
        except ValidationError as problem:
            error = validation_error(problem.errors(), list(schema.model_fields))
        except LostError:
            raise
        except Exception as problem:  # one line's failure is that line's
            known = self._service.api_error(problem)
            if known is None:
                log.error("a line of batch %s failed", self.id, exc_info=problem)
            error = known or ApiError(500, INTERNAL, code="internal_error")
        if error.code == ENGINE_FAILED:  # no line will be answered before a restart
            self.is_stopped = True
        return (0 if error.status == 503 else error.status), error.body(), []

    def _route(self, url: Endpoint) -> tuple[Schema, Work]:
        if url != "/v1/responses":
            return ROUTES[url]
        store, owner = self._store.responses, self.row.owner
        work = partial(collect_response, store=store, owner=owner, persist=self._persist)
        return ResponseRequest, work

    async def _patiently(self, work: Work, body: BaseModel) -> str:
        """Tries again while there is no room for it; ApiError 503 once the batch is to end."""
        caller = Caller(is_background=True, owner=self.row.owner or "batches")
        while not self._is_ending():
            try:
                return await work(self._service, body, caller)
            except Exception as problem:
                error = self._service.api_error(problem)
                if error is None or error.code == ENGINE_FAILED or error.status not in (429, 503):
                    raise
            await asyncio.sleep(FULL_QUEUE_SECONDS)
        raise overloaded("the batch is to end")

    def _is_ending(self) -> bool:
        """Whether no more lines are begun."""
        return self.is_cancelled or self.is_stopped or self._service.is_draining


async def _run_all(workers: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs them side by side; raises what one that failed raised. No other runs on after it."""
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (failure := task.exception()) is not None:
            raise failure
