"""`/v1/files` and `/v1/batches`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.responses import Response

from rorqual.serve.batches import Batches
from rorqual.serve.errors import ApiError, validation_error
from rorqual.serve.routes import key_owner_of
from rorqual.serve.schemas_batches import (
    UPLOADED,
    BatchList,
    BatchReply,
    BatchRequest,
    ExpiresAfter,
    FileDeleted,
    FileList,
    FileReply,
)
from rorqual.serve.schemas_common import Body
from rorqual.serve.service import Service
from rorqual.serve.store import FileStore, NewFile, Page

CHUNK_BYTES = 1 << 20
EXPIRY = {"expires_after[anchor]": "anchor", "expires_after[seconds]": "seconds"}
UPLOAD_FIELDS = {"file", "purpose", "expires_after", *EXPIRY}
After = Annotated[str | None, Query(max_length=64)]
Order = Annotated[Literal["asc", "desc"], Query()]


def batch_router() -> APIRouter:
    router = APIRouter(tags=["batches"])

    @router.post("/v1/files", response_model=FileReply)
    async def upload(
        request: Request,
        response: Response,
        file: Annotated[UploadFile, File()],
        purpose: Annotated[str, Form()],
    ) -> Any:
        """Keeps a file; `purpose` is `batch` (a JSONL file of requests), `user_data` or `evals`."""
        form = await request.form()
        rest = Body.model_validate(dict.fromkeys(sorted(set(form) - UPLOAD_FIELDS)))
        _take_notes(request, response, rest)
        known = next((each for each in UPLOADED if each == purpose), None)
        if known is None:
            text = f"purpose: only {', '.join(UPLOADED)} are supported"
            raise ApiError(422, text, code="invalid_value", param="purpose")
        new = NewFile(
            name=file.filename or "upload.jsonl",
            owner=key_owner_of(request),
            purpose=known,
            seconds=_expiry(form),
        )
        return await _files(request).add(_chunks(file), file.size or 0, new)

    @router.get("/v1/files", response_model=FileList)
    async def list_files(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: After = None,
        order: Order = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> Any:
        page = Page(limit, after, order)
        data, has_more = await _files(request).page(key_owner_of(request), page, purpose)
        first, last = _ends(data)
        return FileList(data=data, has_more=has_more, first_id=first, last_id=last)

    @router.get("/v1/files/{file_id}", response_model=FileReply)
    async def get_file(request: Request, file_id: str) -> Any:
        return await _files(request).get(file_id, key_owner_of(request))

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse)
    async def get_content(request: Request, file_id: str) -> Any:
        path, found = await _files(request).content_of(file_id, key_owner_of(request))
        return FileResponse(path, media_type="application/octet-stream", stat_result=found)

    @router.delete("/v1/files/{file_id}", response_model=FileDeleted)
    async def delete_file(request: Request, file_id: str) -> Any:
        await _files(request).delete(file_id, key_owner_of(request))
        return FileDeleted(id=file_id)

    @router.post("/v1/batches", response_model=BatchReply)
    async def create_batch(request: Request, response: Response, body: BatchRequest) -> Any:
        """Answers every line of a file; see the batch's status for its output file."""
        _take_notes(request, response, body)
        return await _batches(request).create(body, key_owner_of(request))

    @router.get("/v1/batches", response_model=BatchList)
    async def list_batches(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: After = None,
        order: Order = "desc",
    ) -> Any:
        page = Page(limit, after, order)
        data, has_more = await _batches(request).page(key_owner_of(request), page)
        first, last = _ends(data)
        return BatchList(data=data, has_more=has_more, first_id=first, last_id=last)

    @router.get("/v1/batches/{batch_id}", response_model=BatchReply)
    async def get_batch(request: Request, batch_id: str) -> Any:
        return await _batches(request).get(batch_id, key_owner_of(request))

    @router.post("/v1/batches/{batch_id}/cancel", response_model=BatchReply)
    async def cancel_batch(request: Request, batch_id: str) -> Any:
        return await _batches(request).cancel(batch_id, key_owner_of(request))

    return router


def _take_notes(request: Request, response: Response, body: Body) -> None:
    """Names the fields without effect, or refuses them."""
    service: Service = request.app.state.service
    service.check_body(body)
    response.headers.update(body.notes.headers())


def _expiry(form: Mapping[str, Any]) -> int | None:
    """Seconds of `expires_after`, which OpenAI's clients send as two fields of the form."""
    if "expires_after" in form:
        message = f"expires_after: send it as {' and '.join(EXPIRY)}"
        raise ApiError(422, message, code="invalid_value", param="expires_after")
    given: dict[str, Any] = {name: form[key] for key, name in EXPIRY.items() if key in form}
    if not given:
        return None
    if isinstance(text := given.get("seconds"), str) and text.isdecimal() and len(text) < 19:
        given["seconds"] = int(text)  # a form has texts only
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValidationError as problem:
        faults = [{**fault, "loc": ("expires_after", *fault["loc"])} for fault in problem.errors()]
        raise validation_error(faults) from None


def _ends(data: list[Any]) -> tuple[str | None, str | None]:
    return (data[0].id, data[-1].id) if data else (None, None)


def _chunks(file: UploadFile) -> Iterator[bytes]:
    while chunk := file.file.read(CHUNK_BYTES):
        yield chunk


def _files(request: Request) -> FileStore:
    files: FileStore = request.app.state.store.files
    return files


def _batches(request: Request) -> Batches:
    batches: Batches = request.app.state.batches
    return batches
