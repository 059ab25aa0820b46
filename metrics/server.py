"""``/metrics`` over HTTP, for Prometheus to scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

from pagemgr.errors import ConfigError

from .collector import collector

if TYPE_CHECKING:
    from pagemgr.cache import PagedKVCache


class Server:
    """Serves what a registry collects until ``close``, or until its ``with`` block ends. See ``serve``."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            reason = error.strerror or error
            hint = "set metrics.host and metrics.port to an address of this machine that is free; port 0 takes one"
            raise ConfigError(f"/metrics cannot listen on {host}:{port}: {reason}; {hint}") from error
        self._registry = registry
        self.host = host
        self.port = self._server.server_port

    def speak_plainly(self) -> None:
        """Answer in the older text format whatever is asked for: it has no exemplars, but keeps colons in names."""
        app = make_wsgi_app(self._registry)

        def plain(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ.pop("HTTP_ACCEPT", None)
            answer: Iterable[bytes] = app(environ, start_response)
            return answer

        self._server.set_app(plain)

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop listening. Closing twice is fine."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(cache: PagedKVCache, *others: PagedKVCache, registry: CollectorRegistry | None = None) -> Server:
    """Serve the metrics of these caches where the first one's config says: ``metrics.host`` and ``metrics.port``.

    ``registry`` is served with the metrics added to it, so that an engine's own metrics can stand beside them; a fresh
    one unless given. Raises ``ConfigError`` if no port is set or the address cannot be listened on, ``ValueError`` if
    the registry has these metrics already.
    """
    settings = cache.config.metrics
    if settings.port is None:
        raise ConfigError("metrics.port is not set, so /metrics has nowhere to listen: set a port, or 0 for a free one")
    served = CollectorRegistry() if registry is None else registry
    pools = collector(cache, *others)
    served.register(pools)
    try:
        server = Server(served, settings.host, settings.port)
    except ConfigError:
        served.unregister(pools)
        raise
    if any(one.config.metrics.vllm_names for one in (cache, *others)):
        server.speak_plainly()  # prometheus_client up to 0.26 writes vllm_ for vllm: in OpenMetrics
    return server
