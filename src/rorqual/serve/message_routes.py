"""Anthropic's routes; also under `/anthropic`, where DeepSeek's service has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rorqual.serve.bodies import BodyRoute
from rorqual.serve.messages import answer_message, count_tokens
from rorqual.serve.messages_errors import PREFIXES
from rorqual.serve.routes import EVENTS, caller_of, service_of
from rorqual.serve.schemas_messages import (
    CountReply,
    CountRequest,
    MessagesErrorBody,
    MessagesReply,
    MessagesRequest,
)

STATUSES = (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": MessagesErrorBody} for status in STATUSES
}


def message_router() -> APIRouter:
    router = APIRouter(tags=["messages"], responses=ERRORS, route_class=BodyRoute)
    for prefix in PREFIXES:
        is_described = prefix == ""

        @router.post(
            prefix + "/v1/messages",
            response_model=MessagesReply,
            responses=EVENTS,
            include_in_schema=is_described,
        )
        async def messages(request: Request, body: MessagesRequest) -> Response:
            """Anthropic's API: the next message of a conversation."""
            return await answer_message(service_of(request), body, caller_of(request))

        @router.post(
            prefix + "/v1/messages/count_tokens",
            response_model=CountReply,
            include_in_schema=is_described,
        )
        async def count(request: Request, response: Response, body: CountRequest) -> Any:
            """How many tokens the prompt of such a message has."""
            num_tokens = await count_tokens(service_of(request), body, caller_of(request))
            response.headers.update(body.notes.headers())
            return CountReply(input_tokens=num_tokens)

    return router
