"""The application: routes, guards around them, and the engine's life within it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from rorqual.serve.answers import EngineFace
from rorqual.serve.auth import AuthGuard
from rorqual.serve.batch_routes import batch_router
from rorqual.serve.batches import Batches
from rorqual.serve.error_handlers import install_handlers
from rorqual.serve.limits import LimitGuard
from rorqual.serve.message_routes import message_router
from rorqual.serve.messages_errors import MessagesErrors
from rorqual.serve.notes import IGNORED_HEADER, NOTES_HEADER
from rorqual.serve.page_api import page_api_router
from rorqual.serve.page_routes import page_router
from rorqual.serve.paths import SlashTrimmer
from rorqual.serve.request_ids import HEADER, RequestIds
from rorqual.serve.response_routes import response_router
from rorqual.serve.routes import ERRORS, api_router, health_router
from rorqual.serve.service import Service
from rorqual.serve.settings import ServedModel, ServerSettings
from rorqual.serve.store import Store

DESCRIPTION = (
    "OpenAI's and Anthropic's routes, with DeepSeek's fields. Unknown fields are ignored, and "
    "named in a header."
)

EXPOSED_HEADERS = ("retry-after", "x-should-retry", HEADER, "request-id")
"""What pages of other sites may read beside the body; the SDKs look at the first two."""


def create_app(
    engine: EngineFace,
    model: ServedModel,
    settings: ServerSettings | None = None,
    *,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """An ASGI application that starts and closes `engine` with its lifespan.

    `app.state.service` holds what the routes share, `app.state.store` what outlasts the server;
    `clock` is what files and batches take for the time.
    """
    settings = settings or ServerSettings()
    service = Service(engine, model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = await asyncio.to_thread(Store, settings, clock)
        app.state.store, app.state.batches = store, Batches(service, store)
        try:
            await asyncio.to_thread(store.recover)
            await engine.start()
            service.is_started = True
            await app.state.batches.start()
            yield
        finally:
            service.is_draining = True
            await app.state.batches.close()
            await engine.close()
            service.close()
            await asyncio.to_thread(store.close)

    app = FastAPI(
        title="Rorqual",
        version=version("rorqual"),
        description=DESCRIPTION,
        lifespan=lifespan,
        # FastAPI's own pages load scripts from elsewhere; the description is a route of ours.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    install_handlers(app)
    app.include_router(api_router())
    app.include_router(message_router())
    app.include_router(response_router(), responses=ERRORS)
    app.include_router(batch_router(), responses=ERRORS)
    app.include_router(health_router())
    app.include_router(page_api_router())
    app.include_router(page_router())
    # The last one added is the outermost.
    app.add_middleware(LimitGuard, service=service)
    app.add_middleware(AuthGuard, settings=settings)
    app.add_middleware(MessagesErrors)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            # Whatever a page asks for is named back to it: SDKs send headers of their own, such
            # as x-stainless-lang. None of them opens anything but a key, which the page must know.
            allow_headers=["*"],
            allow_private_network=True,  # Chromium asks before a public page may reach this machine
            expose_headers=[*EXPOSED_HEADERS, IGNORED_HEADER, NOTES_HEADER],
        )
    app.add_middleware(SlashTrimmer)
    app.add_middleware(RequestIds)
    return app


async def drain(app: FastAPI) -> bool:
    """Takes no new requests and waits for the running ones; whether all of them finished in time.

    The caller stops the server afterwards.
    """
    service: Service = app.state.service
    service.is_draining = True
    return await service.drain(app.state.batches.drain())
