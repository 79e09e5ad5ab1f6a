"""The routes of `/v1/responses`; also without `/v1`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from rorqual.serve.bodies import BodyRoute
from rorqual.serve.errors import ApiError
from rorqual.serve.response_input import Record
from rorqual.serve.responses import (
    answer_response,
    count_input,
    input_items,
    recall,
    whole_response,
)
from rorqual.serve.routes import EVENTS, caller_of, key_owner_of, service_of
from rorqual.serve.schemas_responses import (
    InputRequest,
    InputTokens,
    ItemList,
    ResponseDeleted,
    ResponseReply,
    ResponseRequest,
)
from rorqual.serve.store.responses import ResponseStore


def response_router() -> APIRouter:
    router = APIRouter(tags=["responses"], route_class=BodyRoute)
    for prefix in ("/v1", ""):
        _add_routes(router, prefix + "/responses", is_described=bool(prefix))
    return router


def _add_routes(router: APIRouter, path: str, *, is_described: bool) -> None:
    shown: dict[str, Any] = {"include_in_schema": is_described}

    @router.post(path, response_model=ResponseReply, responses=EVENTS, **shown)
    async def create(request: Request, body: ResponseRequest) -> Response:
        """OpenAI's newer API: items in, items out, and conversations that the server keeps."""
        return await answer_response(
            service_of(request), _store(request), key_owner_of(request), body, caller_of(request)
        )

    @router.post(path + "/input_tokens", response_model=InputTokens, **shown)
    async def count(request: Request, response: Response, body: InputRequest) -> Any:
        """How many tokens the prompt of such a request has."""
        service, store = service_of(request), _store(request)
        num_tokens = await count_input(
            service, store, key_owner_of(request), body, caller_of(request)
        )
        response.headers.update(body.notes.headers())
        return InputTokens(input_tokens=num_tokens)

    @router.post(path + "/compact", include_in_schema=False)
    async def compact(request: Request) -> Response:
        """501: nothing here makes a conversation shorter but `truncation`."""
        message = "conversations are not compacted here; use truncation, or ask for a summary"
        raise ApiError(501, message, code="unsupported", headers={"x-should-retry": "false"})

    @router.get(path + "/{response_id}", response_model=ResponseReply, **shown)
    async def get(request: Request, response_id: str, stream: bool = False) -> Response:
        """A stored response."""
        if stream:
            message = "a stored response is not streamed again; leave out stream"
            raise ApiError(422, message, code="unsupported", param="stream")
        return await _recalled(request, response_id, whole_response)

    @router.delete(path + "/{response_id}", response_model=ResponseDeleted, **shown)
    async def delete(request: Request, response_id: str) -> Any:
        """Those that follow it stay, but cannot be gone on with."""
        await _store(request).delete(response_id, key_owner_of(request))
        return ResponseDeleted(id=response_id)

    @router.get(path + "/{response_id}/input_items", response_model=ItemList, **shown)
    async def items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """What the response's own request gave, without what came before it."""
        write = partial(input_items, limit=limit, after=after, order=order)
        return await _recalled(request, response_id, write)


async def _recalled(request: Request, response_id: str, write: Callable[[Record], str]) -> Response:
    service, store, caller = service_of(request), _store(request), caller_of(request)
    text = await recall(service, store, key_owner_of(request), response_id, caller, write)
    return Response(text, media_type="application/json")


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.store.responses
    return store
