"""Asks a running pool over HTTP: the documents of its JSON API."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from pagemgr.errors import ConfigError, InvalidInput

SECONDS = 5.0
MOST_BYTES = 64 << 20
"""Of one answer: a pool says less."""


class Client:
    """``url`` is the root of what ``pagemgr serve`` or ``cache.serve`` serves, or its page."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise InvalidInput(f"{url!r} has no valid port: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"must be a URL such as http://127.0.0.1:8620, got {url!r}")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = parts.hostname, port
        self._root = parts.path.rstrip("/").removesuffix("/ui")
        self.url = f"{parts.scheme}://{parts.netloc}{self._root}"

    def ask(self, *names: str) -> dict[str, Any]:
        """These documents, by name. Raises ``ConfigError`` that says what to do if there is no answer."""
        connection = self._kind(self._host, self._port, timeout=SECONDS)
        try:
            return {name: self._one(connection, name) for name in names}
        except (OSError, HTTPException, ValueError) as error:
            raise ConfigError(
                f"no pool answers at {self.url}: {error}. Start one with pagemgr serve, or cache.serve() in the "
                "engine, and give the address that it prints"
            ) from error
        finally:
            connection.close()

    def _one(self, connection: HTTPConnection, name: str) -> Any:
        connection.request("GET", f"{self._root}/api/v1/{name}")
        response = connection.getresponse()
        body = response.read(MOST_BYTES)
        if response.status != 200:
            raise HTTPException(f"{name} is answered with status {response.status}")
        return json.loads(body)
