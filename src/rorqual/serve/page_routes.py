"""The chat page at `/`: files of the package, read once at the start.

A request's path is only looked up among them, so none reaches the file system. The policy lets
the page load its own files and talk to its own server, and nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.responses import Response

from rorqual.serve.errors import ApiError

INDEX = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    kind: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """Every file of `serve/page/` by its path there; empty if the page is not installed."""
    root = resources.files("rorqual.serve") / "page"
    files = {}
    for name, file in _walk(root, ""):
        suffix = name[name.rfind(".") :]
        if suffix in KINDS:
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
            files[name] = PageFile(content, KINDS[suffix], etag)
    return files


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        else:
            found.append((prefix + entry.name, entry))
    return found


def page_router() -> APIRouter:
    """`/` and `/page/...`."""
    router = APIRouter(include_in_schema=False)
    files = read_page()

    def give(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise ApiError(404, "there is no such page", code="not_found")
        headers = HEADERS | {"etag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(None, 304, headers)
        return Response(file.content, 200, headers, media_type=file.kind)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return give(request, INDEX)

    @router.api_route("/page/{name:path}", methods=["GET", "HEAD"])
    async def part(request: Request, name: str) -> Response:
        return give(request, name)

    return router
