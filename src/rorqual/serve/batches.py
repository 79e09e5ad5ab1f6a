"""Offline batches: every line of an uploaded file is a request; the answers make another file.

Lines are checked before any runs. A few run side by side and give way to the queue: when it is
full they wait. A batch that is cancelled or fails, or whose server stops, keeps what it has.
Batches live in memory: after a restart only the files are left.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from rorqual.log import logger
from rorqual.serve.chat import collect_chat
from rorqual.serve.completions import collect_completion
from rorqual.serve.errors import (
    ENGINE_FAILED,
    INTERNAL,
    ApiError,
    overloaded,
    validation_error,
)
from rorqual.serve.files import FileStore
from rorqual.serve.schemas_batches import (
    BatchError,
    BatchErrors,
    BatchLine,
    BatchReply,
    BatchRequest,
)
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_common import SamplingFields
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.service import Service, new_id

log = logger("serve")

MAX_LINES = 50_000
MAX_BATCHES = 1000
MAX_SHOWN_FAULTS = 20
FULL_QUEUE_SECONDS = 0.25
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")

Work = Callable[[Service, Any], Awaitable[str]]
ROUTES: Mapping[str, tuple[type[SamplingFields], Work]] = {
    "/v1/chat/completions": (ChatRequest, collect_chat),
    "/v1/completions": (CompletionRequest, collect_completion),
}


@dataclass
class Job:
    """A batch and the task that runs it."""

    reply: BatchReply
    owner: str
    task: asyncio.Task[None] | None = None
    is_cancelled: bool = False


class Batches:
    """All batches of a server."""

    def __init__(self, service: Service, files: FileStore) -> None:
        self._service, self._files = service, files
        self._jobs: dict[str, Job] = {}
        self._room = asyncio.Semaphore(service.settings.batch_concurrency)

    async def create(self, body: BatchRequest, owner: str) -> BatchReply:
        """Starts a batch; ApiError 404 without the input file, 429 if there are too many."""
        self._files.get(body.input_file_id, owner)
        if len(self._jobs) >= MAX_BATCHES:
            self._forget_oldest()
        reply = BatchReply(
            id=new_id("batch_"),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            status="validating",
            created_at=int(time.time()),
            metadata=body.metadata,
        )
        job = self._jobs[reply.id] = Job(reply, owner)
        job.task = asyncio.create_task(self._run(job))
        return reply.model_copy(deep=True)

    def all_of(self, owner: str) -> list[BatchReply]:
        """The newest first."""
        return [job.reply for job in reversed(self._jobs.values()) if job.owner == owner]

    def get(self, batch_id: str, owner: str) -> BatchReply:
        return self._job(batch_id, owner).reply

    def cancel(self, batch_id: str, owner: str) -> BatchReply:
        """Ends a running batch soon; one that has ended stays as it is."""
        job = self._job(batch_id, owner)
        if job.reply.status in ("validating", "in_progress"):
            job.is_cancelled = True
            job.reply.status = "cancelling"
            job.reply.cancelling_at = int(time.time())
        return job.reply

    async def drain(self) -> None:
        """Waits for the lines that run; the others are not begun any more."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        for job in self._jobs.values():
            if job.task is not None:
                job.task.cancel()
        await self.drain()

    def _job(self, batch_id: str, owner: str) -> Job:
        job = self._jobs.get(batch_id)
        if job is None or job.owner != owner:
            raise ApiError(404, "there is no such batch", code="batch_not_found", param="batch_id")
        return job

    def _forget_oldest(self) -> None:
        ended = [key for key, job in self._jobs.items() if job.reply.status not in RUNNING]
        if not ended:
            headers = {"retry-after": "60"}
            raise ApiError(429, "too many batches are running", code="too_many", headers=headers)
        del self._jobs[ended[0]]

    async def _run(self, job: Job) -> None:
        reply = job.reply
        try:
            faults = await asyncio.to_thread(self._check_lines, job)
            if faults:
                reply.errors = BatchErrors(data=faults)
                reply.status, reply.failed_at = "failed", int(time.time())
                return
            if not job.is_cancelled:
                reply.status, reply.in_progress_at = "in_progress", int(time.time())
            await self._run_lines(job)
        except ApiError as problem:  # the input file was deleted meanwhile, or the engine failed
            reply.errors = BatchErrors(
                data=[BatchError(code=problem.code or "failed", message=problem.message)]
            )
            reply.status, reply.failed_at = "failed", int(time.time())
        except Exception as problem:  # nobody waits for this task: its reply tells
            log.error("batch %s failed", reply.id, exc_info=problem)
            reply.errors = BatchErrors(data=[BatchError(code="internal_error", message=INTERNAL)])
            reply.status, reply.failed_at = "failed", int(time.time())

    def _check_lines(self, job: Job) -> list[BatchError]:
        """What is wrong with the file, by line; counts the lines."""
        faults: list[BatchError] = []
        seen: set[str] = set()
        for number, line in _numbered(self._files.lines(job.reply.input_file_id, job.owner)):
            fault = _fault_of(line, job.reply.endpoint, seen, self._service.settings.max_body_bytes)
            if fault is not None:
                faults.append(fault.model_copy(update={"line": number}))
            job.reply.request_counts.total += 1
            if len(faults) >= MAX_SHOWN_FAULTS or job.reply.request_counts.total > MAX_LINES:
                break
        if not job.reply.request_counts.total:
            faults.append(BatchError(code="empty_file", message="the file has no requests"))
        if job.reply.request_counts.total > MAX_LINES:
            message = f"the file has more than {MAX_LINES} requests"
            faults.append(BatchError(code="too_many_requests", message=message))
        return faults

    async def _run_lines(self, job: Job) -> None:
        reply, folder = job.reply, self._files.folder
        parts = {kind: folder / f"{reply.id}.{kind}.part" for kind in ("output", "error")}
        try:
            with parts["output"].open("wb") as output, parts["error"].open("wb") as errors:
                lines = _numbered(self._files.lines(reply.input_file_id, job.owner))
                num_workers = self._service.settings.batch_concurrency
                workers = [self._work(job, lines, output, errors) for _ in range(num_workers)]
                failure = await _run_all(workers)
            is_stopped = self._is_ending(job)
            if not is_stopped and failure is None:
                reply.status, reply.finalizing_at = "finalizing", int(time.time())
            reply.output_file_id = await self._keep(parts["output"], "output", job)
            reply.error_file_id = await self._keep(parts["error"], "error", job)
            if failure is not None:
                raise failure
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        now = int(time.time())
        counts = reply.request_counts
        if is_stopped and counts.completed + counts.failed < counts.total:
            reply.status, reply.cancelled_at = "cancelled", now
        else:
            reply.status, reply.completed_at = "completed", now

    async def _keep(self, part: Path, kind: str, job: Job) -> str | None:
        if not part.stat().st_size:
            return None
        return (await self._files.adopt(part, f"{job.reply.id}_{kind}.jsonl", job.owner)).id

    async def _work(
        self, job: Job, lines: Iterator[tuple[int, bytes]], output: IO[bytes], errors: IO[bytes]
    ) -> None:
        """Answers lines, one after the other, until there are none or the batch is to end."""
        for _, raw in lines:
            if self._is_ending(job):
                return
            line = BatchLine.model_validate_json(raw)
            async with self._room:
                status, body, ignored = await self._answer(job, line)
            if status == 0:
                return
            is_good = status == 200
            if is_good:
                job.reply.request_counts.completed += 1
            else:
                job.reply.request_counts.failed += 1
            (output if is_good else errors).write(_record(line.custom_id, status, body, ignored))

    async def _answer(self, job: Job, line: BatchLine) -> tuple[int, str, list[str]]:
        """(status, JSON, names of fields without effect) of one request; status 0 if the batch
        ended before there was room for it.
        """
        schema, work = ROUTES[line.url]
        try:
            body = schema.model_validate(line.body)
            if body.stream:
                raise ApiError(422, "a batch cannot stream", code="unsupported", param="stream")
            async with asyncio.timeout(self._service.settings.request_timeout_seconds):
                answer = await self._patiently(job, work, body)
                return 200, answer, body.notes.ignored
        except ValidationError as problem:
            error = validation_error(problem.errors(), list(schema.model_fields))
        except TimeoutError:
            error = ApiError(504, "the answer took too long", code="timeout")
        except Exception as problem:  # one line's failure is that line's
            known = self._service.api_error(problem)
            if known is None:
                log.error("a line of batch %s failed", job.reply.id, exc_info=problem)
            error = known or ApiError(500, INTERNAL, code="internal_error")
        if error.code == ENGINE_FAILED:  # no other line will be answered either
            raise error
        return (0 if error.status == 503 else error.status), error.body(), []

    async def _patiently(self, job: Job, work: Work, body: BaseModel) -> str:
        """Tries again while the queue is full; ApiError 503 once the batch is to end."""
        while not self._is_ending(job):
            try:
                return await work(self._service, body)
            except Exception as problem:
                error = self._service.api_error(problem)
                if error is None or error.status != 429:
                    raise
            await asyncio.sleep(FULL_QUEUE_SECONDS)
        raise overloaded("the batch is to end")

    def _is_ending(self, job: Job) -> bool:
        """Whether no more lines are begun."""
        return job.is_cancelled or self._service.is_draining


async def _run_all(workers: Sequence[Coroutine[Any, Any, None]]) -> BaseException | None:
    """Runs them side by side; what one that failed raised. No other runs on after it."""
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    failures = [task.exception() for task in tasks if not task.cancelled()]
    return next((failure for failure in failures if failure is not None), None)


def _numbered(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1, without blank lines."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line


def _fault_of(raw: bytes, endpoint: str, seen: set[str], max_bytes: int) -> BatchError | None:
    if len(raw) > max_bytes:
        message = f"the line is longer than this server's limit of {max_bytes} bytes"
        return BatchError(code="line_too_long", message=message)
    try:
        line = BatchLine.model_validate_json(raw)
    except ValidationError as problem:
        error = validation_error(problem.errors(), list(BatchLine.model_fields))
        return BatchError(code="invalid_line", message=error.message, param=error.param)
    if line.url != endpoint:
        message = f"the url is not the batch's endpoint {endpoint}"
        return BatchError(code="mismatched_url", message=message, param="url")
    if line.custom_id in seen:
        message = f"custom_id {line.custom_id[:80]!r} is there twice"
        return BatchError(code="duplicate_custom_id", message=message, param="custom_id")
    seen.add(line.custom_id)
    return None


def _record(custom_id: str, status: int, body: str, ignored: Sequence[str]) -> bytes:
    request_id = new_id("req_")
    response = {"status_code": status, "request_id": request_id, "body": json.loads(body)}
    if ignored:
        response["ignored_fields"] = ignored
    record = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response}
    return (json.dumps(record | {"error": None}, ensure_ascii=False) + "\n").encode()
