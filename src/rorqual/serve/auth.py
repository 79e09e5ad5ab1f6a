"""Who may ask: API keys from a file, and no other site's pages.

Keys are compared by `hmac.compare_digest` over hashes of equal length, every key each time, so
that the time tells nothing. A browser sends `Origin` with a page's request: one that is neither
this server nor in `--cors-origin` is refused. A keyless server answers only to `localhost`, to
addresses, and to names in `--allow-host`, so that no foreign page reaches it through a name of its
own that it lets point here (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.errors import UsageError
from rorqual.serve.errors import ApiError
from rorqual.serve.framing import host_name
from rorqual.serve.settings import ServerSettings

OPEN_PATHS = ("/", "/health", "/ready", "/favicon.ico")
OPEN_PREFIX = "/page/"
KEYED_PREFIX = "/page/api/"
"""What the page asks for, unlike its files, needs a key as all else does."""
MIN_KEY_CHARACTERS = 8
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z*]+")


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; blank lines and lines that begin with # are skipped. UsageError if none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        fix = "write a text file with one key a line, or name another --api-key-file"
        raise UsageError(f"the key file cannot be read: {problem}", where=path, fix=fix) from None
    texts = ((number, line.strip()) for number, line in enumerate(lines, 1))
    keys = {number: key for number, key in texts if key and key[0] != "#"}
    if not keys:
        raise UsageError("there is no key in the file", where=path, expected="one key a line")
    for number, key in keys.items():
        if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or " " in key:
            raise UsageError(  # never shows the key
                "the key cannot be used",
                where=f"{path}, line {number}",
                expected=f"at least {MIN_KEY_CHARACTERS} ASCII characters without spaces",
            )
    return tuple(keys.values())


def check_origins(origins: Sequence[str]) -> None:
    """UsageError for what no browser sends as `Origin`, so that it would allow nobody."""
    for origin in origins:
        if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
            raise UsageError(
                "--cors-origin is no origin of a page",
                found=repr(origin),
                expected="scheme://host or scheme://host:port in small letters, without a path; "
                "or * for every site",
                fix="take from the page's address what stands before its path, in small letters",
            )


def check_hosts(names: Sequence[str]) -> None:
    """UsageError for what no client sends as the name in `Host`, so that it would allow nobody."""
    for name in names:
        if not name or ":" in name or host_name(name) is None:
            raise UsageError(
                "--allow-host is no name of a server",
                found=repr(name),
                expected="a name without scheme, port and path, such as whale.example",
                fix="take from the server's address what stands between // and the port",
            )


class Keys:
    """The keys of a server; without any, everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def are_needed(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str | None:
        """A name for the key in `Authorization: Bearer KEY`, made from its hash; None: no such key.

        Files and batches belong to an owner.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        is_known = False
        for known in self._digests:  # all of them, whichever it is
            is_known |= hmac.compare_digest(digest, known)
        if scheme.lower() != "bearer" or not is_known:
            return None
        return hashlib.sha256(b"owner" + digest).hexdigest()[:16]

    def owner_of(self, headers: Headers) -> str | None:
        """Of `Authorization`, else of `x-api-key`, as Anthropic's clients send it."""
        owner = self.owner(headers.get("authorization"))
        return owner or self.owner(f"Bearer {headers.get('x-api-key', '')}")


class AuthGuard:
    """ASGI middleware: 401 without a valid key, 403 for another site's page."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = Keys(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"]
        owner: str | None = ""
        problem = self._foreign(headers)
        if self._keys.are_needed and not _is_open(path):
            owner = self._keys.owner_of(headers)
        if problem is None and owner is None:
            problem = ApiError(
                401,
                "no valid API key; send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if problem is not None:
            await problem.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _foreign(self, headers: Headers) -> ApiError | None:
        host = headers.get("host")
        # Without any Host it is HTTP/1.0, and no browser.
        if not self._keys.are_needed and host is not None and not self._is_own(host):
            message = (
                f"this server answers to localhost and addresses, not to {host[:100]!r}; to serve "
                "it under a name start it with --allow-host NAME or --api-key-file"
            )
            return ApiError(403, message, code="wrong_host")
        origin = headers.get("origin")
        allowed = self._settings.cors_origins
        if origin is None or "*" in allowed or origin in allowed:
            return None
        if _place(origin) == host:
            return None
        message = f"pages of {origin[:100]!r} may not use this server; see --cors-origin"
        return ApiError(403, message, code="wrong_origin")

    def _is_own(self, host: str) -> bool:
        name = host_name(host)
        if name is None or name == "localhost":
            return name is not None
        if name in (allowed.lower() for allowed in self._settings.allowed_hosts):
            return True
        try:
            address = ip_address(name.strip("[]"))
        except ValueError:
            return False
        # Choice: where other machines may ask, every address, since none can be made to point
        # here, and behind a forwarded port this machine does not know which ones lead to it.
        return address.is_loopback or not self._settings.is_loopback


def _is_open(path: str) -> bool:
    """Whether it needs no key."""
    is_file = path.startswith(OPEN_PREFIX) and not path.startswith(KEYED_PREFIX)
    return path in OPEN_PATHS or is_file


def _place(origin: str) -> str | None:
    """host:port of a web page's origin; None for `null` and whatever else is no such origin."""
    scheme, _, place = origin.partition("://")
    # Choice: https counts too, since a proxy may end TLS before this server.
    is_whole = scheme in ("http", "https") and not set(place) & set("/?#@\\")
    return place if is_whole and place else None
