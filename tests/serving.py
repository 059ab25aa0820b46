"""What the tests of the service share: a small pool in use, and a client that says exactly what it is told to."""

from __future__ import annotations

import asyncio
import json
import socket
from http.client import HTTPConnection
from typing import Any

from starlette.types import ASGIApp

import pagemgr
from pagemgr.service import Server

TOKEN = "0123456789abcdef"
SECRET_TOKEN = 1_234_567_891
"""A token id that no answer may contain."""
TENANT = "a-tenants-name"


def make_cache(num_blocks: int = 40, **service: Any) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 1, "num_kv_heads": 1, "head_dim": 8},
            pool={"num_blocks": num_blocks, "block_size": 4, "host_blocks": 20, "max_seq_len": 64, "max_sequences": 32},
            device="cpu",
            service={"port": 0, **service},
        )
    )


def run(cache: pagemgr.PagedKVCache, sequence: pagemgr.Sequence, tokens: list[int]) -> None:
    """Reserve and commit, without bytes."""
    cache.manager.commit(cache.manager.reserve([sequence], [tokens]))


def use(cache: pagemgr.PagedKVCache) -> list[pagemgr.Sequence]:
    """Three sequences of 10 tokens that share two blocks and a tail, one of 5 in the host, and two cached blocks."""
    first = cache.add([SECRET_TOKEN] * 10, pagemgr.Namespace(tenant=TENANT))
    run(cache, first, [SECRET_TOKEN] * 10)
    gone, swapped = cache.add_many([range(8), range(100, 105)])
    run(cache, gone, list(range(8)))
    run(cache, swapped, list(range(100, 105)))
    cache.swap_out([swapped])
    cache.free([gone])
    return [first, *cache.fork(first, 2), swapped]


def ask(server: Server | ASGIApp, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one answer: of a server through its socket, of an application by calling it."""
    if not isinstance(server, Server):
        return asyncio.run(_call(server, path, method, headers))
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode()
    finally:
        connection.close()


async def _call(app: ASGIApp, path: str, method: str, headers: dict[str, str]) -> tuple[int, dict[str, str], str]:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    target, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": target,
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    heads = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], heads, b"".join(part.get("body", b"") for part in sent[1:]).decode()


def document(server: Server | ASGIApp, name: str, under: str = "") -> Any:
    status, _, text = ask(server, f"{under}/api/v1/{name}")
    assert status == 200, text
    return json.loads(text)


def say(server: Server, data: bytes, seconds: float = 10) -> bytes:
    """Send these bytes, and read until the server closes or says nothing for ``seconds``."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as client:
        client.sendall(data)
        return read(client)


def read(client: socket.socket) -> bytes:
    heard = b""
    try:
        while part := client.recv(65536):
            heard += part
    except (TimeoutError, ConnectionResetError):
        pass
    return heard
