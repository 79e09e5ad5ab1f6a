"""What the chat page asks its own server for, beside the API's routes: blocks of markdown as HTML.

No state is kept. The page's files need no key, these do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from rorqual.serve.bodies import BodyRoute
from rorqual.serve.page_markdown import page_html
from rorqual.serve.routes import caller_of, service_of
from rorqual.serve.schemas_common import Strict

MAX_TEXTS, MAX_CHARS = 256, 200_000
"""Of one request: texts, and their characters. What is beyond stays plain."""
MAX_SECONDS = 1.0
"""Of rendering for one request: texts that are left then stay plain."""


class RenderRequest(Strict):
    texts: list[str] = Field(max_length=MAX_TEXTS)


def page_api_router() -> APIRouter:
    router = APIRouter(include_in_schema=False, route_class=BodyRoute)

    @router.post("/page/api/render")
    async def render(request: Request, body: RenderRequest) -> Response:
        """`htmls`, one a text; null for what is to stay plain."""
        num_chars = sum(map(len, body.texts))
        work = partial(rendered, body.texts)
        htmls = await service_of(request).aside(work, "texts", caller_of(request), num_chars)
        return JSONResponse({"htmls": htmls})

    return router


def rendered(texts: Sequence[str]) -> list[str | None]:
    htmls: list[str | None] = []
    num_left, ends_at = MAX_CHARS, time.monotonic() + MAX_SECONDS
    for text in texts:
        num_left -= len(text)
        is_in_time = num_left >= 0 and time.monotonic() < ends_at
        htmls.append(page_html(text) if is_in_time else None)
    return htmls
