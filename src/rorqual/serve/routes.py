"""The routes of models, answers, tokens and health; batches and the page have files of their own.

OpenAI's paths are the described ones. The same routes without `/v1` (DeepSeek's base path) and
under `/beta` (its base for FIM and prefixes) are aliases.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from rorqual.serve.bodies import BodyRoute
from rorqual.serve.chat import answer_chat, written_prompt
from rorqual.serve.completions import answer_completion
from rorqual.serve.errors import ApiError, engine_failed
from rorqual.serve.fair_pool import Caller, owner_of
from rorqual.serve.prompts import check_ids, tokenized_chat
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_common import ErrorBody
from rorqual.serve.schemas_completions import (
    CompletionReply,
    CompletionRequest,
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
)
from rorqual.serve.schemas_replies import ChatReply
from rorqual.serve.service import Service
from rorqual.serve.settings import ServedModel
from rorqual.serve.tokens_text import token_text
from rorqual.tokenizer import Tokenizer

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The body is no JSON, or the prompt cannot be answered.",
        401: "No valid API key.",
        403: "Another site's page, or another host name.",
        404: "No such model, file or batch.",
        405: "The path has no such method.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        422: "A field is unsupported or out of range.",
        429: "The queue is full; see Retry-After.",
        500: "The server's fault.",
        501: "What this server cannot do, as embeddings.",
        503: "Overloaded or shutting down; see Retry-After.",
        504: "The answer took longer than the server allows.",
    }.items()
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "The answer, or with `stream` its chunks as server-sent events.",
    }
}


class ModelCard(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "rorqual"
    max_model_len: int
    # As Anthropic's clients read it.
    type: str = "model"
    display_name: str
    created_at: str
    max_input_tokens: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]
    first_id: str
    last_id: str
    has_more: bool = False


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    return Caller(owner=owner_of(request.scope))


def key_owner_of(request: Request) -> str:
    """Whose files, batches and responses the request may see: the key's; "" where none is asked."""
    owner: str = request.state.owner
    return owner


def api_router() -> APIRouter:
    """Answers, models and tokens."""
    router = APIRouter(responses=ERRORS, route_class=BodyRoute)

    @router.post("/v1/chat/completions", response_model=ChatReply, responses=EVENTS)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """The next message of a conversation."""
        return await answer_chat(service_of(request), body, caller_of(request))

    @router.post("/v1/completions", response_model=CompletionReply, responses=EVENTS)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continues text or token ids; with `suffix` fills in the middle."""
        return await answer_completion(service_of(request), body, caller_of(request))

    @router.get("/v1/models", response_model=ModelList)
    async def list_models(request: Request) -> Any:
        cards = _cards(service_of(request))
        return ModelList(data=cards, first_id=cards[0].id, last_id=cards[-1].id)

    @router.get("/v1/models/{model_id:path}", response_model=ModelCard)
    async def get_model(request: Request, model_id: str) -> Any:
        service = service_of(request)
        service.check_model(model_id)
        return next(card for card in _cards(service) if card.id == model_id)

    @router.post("/tokenize", response_model=TokenizeReply, response_model_exclude_none=True)
    async def tokenize(request: Request, body: TokenizeRequest) -> Any:
        """Ids of a text, or of a conversation as the chat route reads it."""
        service = service_of(request)
        caller, chat = caller_of(request), tokenized_chat(body)
        if chat is not None:
            wants_prompt = body.add_generation_prompt is not False
            ids = await written_prompt(service, chat, caller, add_generation_prompt=wants_prompt)
        else:
            service.check_body(body)
            tokenize = partial(_tokenize, body, service.model.tokenizer)
            ids = await service.aside(tokenize, "prompt", caller, len(body.prompt or ""))
        write = partial(_tokenized, ids, service.model, bool(body.return_token_strs))
        content = await service.aside(write, "prompt", caller, len(ids))
        headers = (chat or body).notes.headers()
        return Response(content, 200, headers, "application/json")

    @router.post("/detokenize", response_model=DetokenizeReply)
    async def detokenize(request: Request, response: Response, body: DetokenizeRequest) -> Any:
        """The text of ids; special tokens show as their names."""
        service = service_of(request)
        service.check_body(body)
        response.headers.update(body.notes.headers())
        tokenizer = service.model.tokenizer

        def decode() -> str:
            check_ids(body.tokens, tokenizer)
            return tokenizer.decode(body.tokens)

        text = await service.aside(decode, "tokens", caller_of(request), len(body.tokens))
        return DetokenizeReply(prompt=text)

    aliases = {"include_in_schema": False}

    @router.post("/v1/embeddings", **aliases)  # type: ignore[arg-type]
    @router.post("/embeddings", **aliases)  # type: ignore[arg-type]
    async def embed(request: Request) -> Response:
        """501: a model that writes is no model of embeddings."""
        raise no_embeddings()

    for prefix in ("", "/beta"):
        router.post(prefix + "/chat/completions", **aliases)(chat)  # type: ignore[arg-type]
        router.post(prefix + "/completions", **aliases)(complete)  # type: ignore[arg-type]
    for prefix in ("", "/beta", "/anthropic/v1"):
        router.get(prefix + "/models", **aliases)(list_models)  # type: ignore[arg-type]
        router.get(prefix + "/models/{model_id:path}", **aliases)(get_model)  # type: ignore[arg-type]
    return router


def health_router() -> APIRouter:
    """What load balancers and Prometheus ask."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses={503: {"model": ErrorBody}})
    async def health(request: Request) -> Any:
        """The process and its engine work: 503 asks for a restart."""
        service = service_of(request)
        if service.engine.failure is not None:
            return engine_failed(service.engine.failure).response()
        return {"status": "ok", "device": service.model.device}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready(request: Request) -> Any:
        """New requests are taken: 503 while starting, while draining and without an engine."""
        service = service_of(request)
        if service.engine.failure is not None:
            return engine_failed(service.engine.failure).response()
        if service.is_started and not service.is_draining:
            return {"status": "ready"}
        state = "draining" if service.is_draining else "starting"
        return ApiError(503, f"the server is {state}", code=state).response()

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus text format."""
        return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/openapi.json", include_in_schema=False)
    async def description(request: Request) -> Response:
        state = request.app.state
        if not hasattr(state, "description"):
            state.description = JSONResponse(request.app.openapi()).body
        return Response(state.description, media_type="application/json")

    return router


def no_embeddings() -> ApiError:
    message = "this server has no embeddings: it serves a language model, which only writes text"
    headers = {"x-should-retry": "false"}  # OpenAI's clients try again what ends in a 5xx
    return ApiError(501, message, code="unsupported", headers=headers)


def _cards(service: Service) -> list[ModelCard]:
    model = service.model
    return [
        ModelCard(
            id=name,
            created=model.created,
            max_model_len=model.max_positions,
            display_name=name,
            created_at=datetime.fromtimestamp(model.created, UTC).isoformat(),
            max_input_tokens=model.max_positions,
        )
        for name in model.names
    ]


def _tokenized(ids: list[int], model: ServedModel, has_texts: bool) -> str:
    """The reply's JSON, a bit at a time: whoever writes a million ids at once holds all others."""
    lists = {"tokens": (json.dumps(token_id) for token_id in ids)}
    if has_texts:
        texts = (token_text(token_id, model.tokenizer) for token_id in ids)
        lists["token_strs"] = (json.dumps(text) for text in texts)
    fields = [f'"count":{len(ids)}', f'"max_model_len":{model.max_positions}']
    fields += [f'"{name}":[{",".join(items)}]' for name, items in lists.items()]
    return "{" + ",".join(fields) + "}"


def _tokenize(body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_raw(
        body.prompt or "",
        bos=body.add_special_tokens is not False,
        reads_special=bool(body.parse_special),
    )
