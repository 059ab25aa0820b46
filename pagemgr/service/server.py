"""The application on a server of its own: uvicorn in a thread, with limits on what a client may cost.

* A connection has ``CONNECTION_SECONDS`` for each request, from its first byte to the last of the answer, and to be
  idle; then it is cut, whoever is slow.
* More than ``MOST_CONNECTIONS`` are closed as they come, so that no client takes the engine's file descriptors.
* Request line and headers are at most ``HEADER_BYTES``; bodies are refused unread (``guard``).
* The header ``Host`` must name this machine, so that no page on the web can reach the pool through its own name.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from types import TracebackType
from typing import Any, Self

import uvicorn
from prometheus_client import CollectorRegistry
from uvicorn.protocols.http.h11_impl import H11Protocol

from pagemgr.cache import PagedKVCache
from pagemgr.errors import ConfigError

from .application import app
from .guard import HEADER_BYTES
from .runner import Workload

CONNECTION_SECONDS = 10.0
MOST_CONNECTIONS = 128
BACKLOG = 128
"""Connections that wait to be accepted, and that are accepted at most before those too many are closed."""
START_SECONDS = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
EVERY_ADDRESS = ("0.0.0.0", "::")

_log = logging.getLogger("pagemgr.service")
_connections = logging.getLogger("pagemgr.service.connections")
_connections.setLevel(logging.ERROR)  # what strangers send is their business, at any rate


class _Connection(H11Protocol):
    """One client, cut when it takes too long."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loggers called uvicorn are those of the user's own server in this process: they are left as they are.
        self.logger = _connections
        self.access_log = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._start_over()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._start_over()
        super().on_response_complete()

    def _start_over(self) -> None:
        self._stop()
        self._deadline = self.loop.call_later(CONNECTION_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


class Server:
    """Serves until ``close``, or until its ``with`` block ends. See ``serve``."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket) -> None:
        self.host, self.port = listening.getsockname()[:2]
        self._server = uvicorn.Server(config)
        self._socket = listening
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="pagemgr-service", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is; without ``/ui``, the root of everything else."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/ui"

    def close(self) -> None:
        """Stop listening, and cut who is still connected. Closing twice is fine."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(
    cache: PagedKVCache,
    *,
    host: str | None = None,
    port: int | None = None,
    registry: CollectorRegistry | None = None,
    workload: Workload | None = None,
) -> Server:
    """Serve the page, the API and the metrics of a cache from a thread, where ``cache.config.service`` says.

    ``host`` and ``port`` beat the config; port 0 takes a free one. The rest as in ``app``. The socket listens when this
    returns. Raises ``ConfigError`` if it cannot.
    """
    settings = cache.config.service
    host, port = settings.host if host is None else host, settings.port if port is None else port
    hosts = ("*",) if host in EVERY_ADDRESS else (*LOOPBACK, host)
    config = uvicorn.Config(
        app(cache, registry=registry, workload=workload, hosts=hosts),
        http=_Connection,
        ws="none",
        loop="asyncio",
        backlog=BACKLOG,
        lifespan="on",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,
        log_config=None,
    )
    if host not in LOOPBACK:
        _log.warning(
            "whoever reaches %s can read the state of the pool: put a proxy that asks who they are before it", host
        )
    return Server(config, _listen(host, port))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "set service.host and service.port to an address of this machine that is free; port 0 takes one"
        raise ConfigError(f"the service cannot listen on {host}:{port}: {reason}; {hint}") from error
    return listening
