"""What a client is told when its request fails: a status and `{"error": {...}}`.

400 the request cannot be read or cannot be a prompt, 401 no valid key, 413 too large, 422 a field
is out of range or unsupported, 429 the queue is full, 503 draining or overloaded, 504 too slow, 500
our own fault.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from rorqual.errors import EngineFailed, RorqualError
from rorqual.serve.fields import BY_PLACE
from rorqual.serve.notes import ExtraField
from rorqual.serve.schemas_common import INVALID_GRAMMAR, TAGGED, TAGS

if TYPE_CHECKING:
    from starlette.responses import Response

MAX_FAULTS = 5
MAX_SHOWN_CHARACTERS = 80
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")
"""Faults for which pydantic has the name of a class, or of a type that is Python's."""
ENGINE_FAILED = "engine_failed"
INTERNAL = "the server failed on this request; its log says more"


class ApiError(Exception):
    """An answer with an error status; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> str:
        """The JSON text of the reply."""
        kind = TYPES.get(self.status, "invalid_request_error")
        if self.code == ENGINE_FAILED:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})  # ASCII, so that half a surrogate pair does no harm

    def response(self) -> Response:
        from starlette.responses import Response  # a reader of requests needs no web server

        return Response(self.body(), self.status, self.headers, media_type="application/json")

    @classmethod
    def of(cls, problem: RorqualError, param: str | None, code: str | None = None) -> ApiError:
        """A fault that a lower room found in the request: 400, with its place as `param`."""
        return cls(400, describe(problem), param=place_of(problem) or param, code=code)


def describe(problem: RorqualError) -> str:
    """A RorqualError on one line; its `fix` speaks to whoever started the server, so it stays."""
    text = problem.what if problem.where is None else f"{problem.where}: {problem.what}"
    notes = [f"found {problem.found}"] if problem.found is not None else []
    notes += [f"expected {problem.expected}"] if problem.expected is not None else []
    return f"{text} ({'; '.join(notes)})" if notes else text


def place_of(problem: RorqualError) -> str | None:
    """`messages[2]` and the like, where the tokenizer names such a place."""
    where = problem.where
    if isinstance(where, str) and where.startswith(("messages[", "tools[")):
        return where
    return None


def overloaded(message: str, retry_after_seconds: int = 1) -> ApiError:
    """503: this server takes no request just now."""
    headers = {"retry-after": str(retry_after_seconds), "connection": "close"}
    return ApiError(503, message, code="overloaded", headers=headers)


def queue_full(retry_after_seconds: int, *, is_own: bool = False) -> ApiError:
    """429. `is_own`: it is full of this client's requests."""
    headers = {"retry-after": str(retry_after_seconds)}
    message = "the queue is full; try again later"
    if is_own:
        message = "you have your share of the server's places; try again when an answer has ended"
    return ApiError(429, message, code="queue_full", headers=headers)


def too_slow(limit_seconds: float) -> ApiError:
    """504. The client must not simply try again what takes too long."""
    message = f"the answer took longer than this server's limit of {limit_seconds:g} s"
    headers = {"x-should-retry": "false"}
    return ApiError(504, message, code="timeout", headers=headers)


def engine_failed(failure: EngineFailed) -> ApiError:
    """503: no request will be answered by this process again."""
    message = f"{describe(failure)}; {failure.fix}"
    return ApiError(503, message, code=ENGINE_FAILED, headers={"connection": "close"})


def validation_error(
    faults: Sequence[Any], known_fields: Sequence[str] = (), whole: str = "the body"
) -> ApiError:
    """One error for all that pydantic found: 400 if it is no JSON object, else 422 with names.

    `whole` is what was read.
    """
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"{whole} is not valid JSON: {reason}", code="invalid_json")
    if tuple(first["loc"]) == ("body",) and first["type"] != "mismatch":
        what = "is empty; it must be" if first["type"] == "missing" else "must be"
        message = f"the body {what} a JSON object, sent with content-type: application/json"
        return ApiError(400, message, code="invalid_body")
    if not first["loc"] and first["type"] in NO_OBJECT:
        return ApiError(400, f"{whole} must be a JSON object", code="invalid_body")
    texts = [_fault(fault, known_fields) for fault in faults[:MAX_FAULTS]]
    if len(faults) > MAX_FAULTS:
        texts.append(f"and {len(faults) - MAX_FAULTS} more")
    is_unknown = first["type"] == "extra_forbidden"
    context = first.get("ctx", {})
    code = "unknown_field" if is_unknown else context.get("code", "invalid_value")
    param = context.get("param") or _place(first["loc"])
    status = 400 if code == INVALID_GRAMMAR else 422
    return ApiError(status, "; ".join(texts), code=code, param=param)


def unknown_error(extras: Sequence[ExtraField]) -> ApiError:
    """422 for fields that nobody documents, for a server that is asked to be strict."""
    texts = [unknown_field(each.place, known_names(each.owner)) for each in extras[:MAX_FAULTS]]
    if len(extras) > MAX_FAULTS:
        texts.append(f"and {len(extras) - MAX_FAULTS} more")
    return ApiError(422, "; ".join(texts), code="unknown_field", param=extras[0].place)


def known_names(owner: BaseModel) -> list[str]:
    """What a request's object may have: declared fields and those that `fields.py` lists."""
    listed = BY_PLACE.get(getattr(owner, "PLACE", ""), {})
    return [*(field.alias or name for name, field in type(owner).model_fields.items()), *listed]


def unknown_field(place: str, known_fields: Sequence[str]) -> str:
    """What is said of a field that nobody knows: its place, and the nearest known name."""
    before, dot, name = place.rpartition(".")
    near = difflib.get_close_matches(name[:MAX_SHOWN_CHARACTERS], known_fields, n=1)
    hint = f"; did you mean {before + dot + near[0]!r}?" if near else ""
    return f"unknown field {place!r}{hint}"


def _fault(fault: Any, known_fields: Sequence[str]) -> str:
    place = _place(fault["loc"])
    if fault["type"] == "mismatch":
        return str(fault["msg"])
    if fault["type"] == "extra_forbidden":
        return unknown_field(place, known_fields)
    if fault["type"] == "missing":
        return f"missing field {place!r}"
    if "input" in fault and fault["input"] is None and not place.endswith("]"):
        return f"missing field {place!r}: null is nothing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    message = "must be a JSON object" if fault["type"] in NO_OBJECT else message
    found = fault.get("input")
    if not isinstance(found, str | int | float | bool) or fault["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {message} (found {repr(found)[:MAX_SHOWN_CHARACTERS]})"


def _place(loc: Sequence[int | str]) -> str:
    """`messages[0].content` from pydantic's path, without the names of union members."""
    parts = list(loc[1:] if loc and loc[0] in ("body", "query", "path", "header") else loc)
    if parts and parts[0] in TAGGED:
        num_before = 2 if parts[0] == "messages" else 1  # messages[0], then its role
        del parts[num_before : num_before + 1]
    named = [part for part in parts if part not in TAGS]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named)
    return text.removeprefix(".") or "body"
