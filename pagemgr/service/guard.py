"""What stands before every answer, wherever the application is mounted: no bodies in, strict headers out."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER_BYTES = 16 * 1024

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of every answer; the page has a content security policy of its own."""


class Guard:
    """Middleware: refuses a request with a body before any of it is read, or with a long head; adds ``HEADERS``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = _refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        else:
            code, reason = refusal
            answer = JSONResponse({"error": reason}, code, {"connection": "close"})
            await answer(scope, receive, send_with_headers)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    """Status and reason, if a request asks for more than it may."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        return 413, "no request here has a body"
    line = len(scope["path"]) + len(scope["query_string"])
    if line + sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
        return 431, f"path, query and headers must be at most {HEADER_BYTES} bytes"
    return None
