"""`/v1/files` and `/v1/batches`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import FileResponse

from rorqual.serve.batches import Batches
from rorqual.serve.errors import ApiError
from rorqual.serve.files import FileStore
from rorqual.serve.schemas_batches import (
    BatchList,
    BatchReply,
    BatchRequest,
    FileDeleted,
    FileList,
    FileReply,
)

CHUNK_BYTES = 1 << 20
UPLOAD_FIELDS = {"file", "purpose"}


def batch_router() -> APIRouter:
    router = APIRouter(tags=["batches"])

    @router.post("/v1/files", response_model=FileReply)
    async def upload(
        request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]
    ) -> Any:
        """Keeps a JSONL file of requests; `purpose` is `batch`."""
        unknown = sorted(set((await request.form()).keys()) - UPLOAD_FIELDS)
        if unknown:
            text = f"unknown or unsupported field {unknown[0][:80]!r}"
            raise ApiError(422, text, code="unknown_field", param=unknown[0][:80])
        if purpose != "batch":
            text = "purpose: only 'batch' is supported"
            raise ApiError(422, text, code="invalid_value", param="purpose")
        name = file.filename or "upload.jsonl"
        return await _files(request).add(_chunks(file), file.size or 0, name, _owner(request))

    @router.get("/v1/files", response_model=FileList)
    async def list_files(request: Request) -> Any:
        return FileList(data=_files(request).all_of(_owner(request)))

    @router.get("/v1/files/{file_id}", response_model=FileReply)
    async def get_file(request: Request, file_id: str) -> Any:
        return _files(request).get(file_id, _owner(request))

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse)
    async def get_content(request: Request, file_id: str) -> Any:
        path = _files(request).path_of(file_id, _owner(request))
        return FileResponse(path, media_type="application/jsonl")

    @router.delete("/v1/files/{file_id}", response_model=FileDeleted)
    async def delete_file(request: Request, file_id: str) -> Any:
        await _files(request).delete(file_id, _owner(request))
        return FileDeleted(id=file_id)

    @router.post("/v1/batches", response_model=BatchReply)
    async def create_batch(request: Request, body: BatchRequest) -> Any:
        """Answers every line of a file; see the batch's status for its output file."""
        return await _batches(request).create(body, _owner(request))

    @router.get("/v1/batches", response_model=BatchList)
    async def list_batches(request: Request) -> Any:
        data = _batches(request).all_of(_owner(request))
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList(data=data, first_id=first, last_id=last)

    @router.get("/v1/batches/{batch_id}", response_model=BatchReply)
    async def get_batch(request: Request, batch_id: str) -> Any:
        return _batches(request).get(batch_id, _owner(request))

    @router.post("/v1/batches/{batch_id}/cancel", response_model=BatchReply)
    async def cancel_batch(request: Request, batch_id: str) -> Any:
        return _batches(request).cancel(batch_id, _owner(request))

    return router


def _chunks(file: UploadFile) -> Iterator[bytes]:
    while chunk := file.file.read(CHUNK_BYTES):
        yield chunk


def _files(request: Request) -> FileStore:
    store: FileStore = request.app.state.files
    return store


def _batches(request: Request) -> Batches:
    batches: Batches = request.app.state.batches
    return batches


def _owner(request: Request) -> str:
    owner: str = request.state.owner
    return owner
