"""Every failure of the application in one shape, whoever found it: a route, FastAPI, Starlette."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rorqual.log import logger
from rorqual.serve.errors import INTERNAL, ApiError, validation_error
from rorqual.serve.request_ids import HEADER

log = logger("serve")


def install_handlers(app: FastAPI) -> None:
    """Gives every failure of `app` the same shape."""

    async def on_api_error(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, ApiError), "registered for ApiError"
        return problem.response()

    async def on_invalid(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError), "registered for this type"
        return validation_error(problem.errors(), fields_of(problem.body, request)).response()

    async def on_http(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException), "registered for HTTPException"
        if (reason := _why_unreadable(problem.__cause__)) is not None:
            message = f"the body cannot be read: {reason}"
            return ApiError(400, message, code="invalid_json").response()
        reasons = {
            404: f"no such route: {request.url.path}",
            405: f"{request.method} is not allowed here",
        }
        default = problem.detail or HTTPStatus(problem.status_code).phrase
        message = reasons.get(problem.status_code, default)
        return ApiError(problem.status_code, message, headers=problem.headers).response()

    async def on_bug(request: Request, problem: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path)  # the traceback follows
        # This reply is sent from outside of all middleware.
        headers = {HEADER: request.scope["request_id"]}
        return ApiError(500, INTERNAL, code="internal_error", headers=headers).response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def _why_unreadable(cause: BaseException | None) -> str | None:
    """What json.loads found, where FastAPI says only that it could not."""
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not {cause.encoding.upper()} (byte {cause.start})"
    if isinstance(cause, RecursionError):
        return "lists and objects are nested too deeply"
    if isinstance(cause, ValueError) and "int_max_str_digits" in str(cause):
        return "a whole number has too many digits"
    return None


def fields_of(body: object, request: Request) -> list[str]:
    """The names that the route's schema knows, for a hint at the nearest."""
    route = request.scope.get("route")
    schema = getattr(getattr(route, "body_field", None), "field_info", None)
    fields = getattr(getattr(schema, "annotation", None), "model_fields", {})
    return list(fields)
