"""The ASGI application: metrics, health, the JSON API and the page, of one cache.

    GET   /ui                                       the page
    GET   /metrics  /healthz  /readyz               for Prometheus and for whoever restarts and routes
    GET   /api/v1/{stats,tiers,blocks,sequences,events,config,history}
    POST  /api/v1/{check,dump,pause,resume}         with the token: these cost or change something

No request has a body, and one that brings one is refused. Nothing is read from disk by a path that a client names.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pagemgr.cache import PagedKVCache
from pagemgr.dump import take, to_document
from pagemgr.errors import InternalError, InvalidInput
from pagemgr.metrics import collector

from .documents import DOCUMENTS, Document
from .guard import Guard
from .page import page
from .reader import HISTORY_SECONDS, Reader
from .runner import Workload

READY_SECONDS = 2.0
"""Within which the pool must answer to be called ready."""

_log = logging.getLogger("pagemgr.service")


def app(
    cache: PagedKVCache,
    *,
    token: str | None = None,
    registry: CollectorRegistry | None = None,
    workload: Workload | None = None,
    hosts: Sequence[str] = ("*",),
) -> ASGIApp:
    """An ASGI application, to be mounted under any path of a server of yours; ``pagemgr.service.serve`` brings its own.

    Without ``token`` (that of ``cache.config.service`` unless given) nothing that needs one can be done. ``registry``
    is what ``/metrics`` shows, one with the cache's collector in it; a fresh one unless given. ``workload`` is what
    can be paused. ``hosts`` are the values of the header ``Host`` that are answered.
    """
    secret = cache.config.service.token
    token = secret.get_secret_value() if token is None and secret is not None else token
    reader = Reader(cache)
    routes = [
        Route("/", _to_page),
        Route("/ui", _page()),
        Route("/metrics", _metrics(_registry(cache) if registry is None else registry)),
        Route("/healthz", _alive),
        Route("/readyz", _ready(reader, workload)),
        *(Route(f"/api/v1/{name}", _document(name, reader)) for name in DOCUMENTS),
        *(
            Route(f"/api/v1/{name}", _action(name, act, token), methods=["POST"])
            for name, act in _actions(cache, workload).items()
        ),
    ]
    made = Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, list(hosts), www_redirect=False)],
        exception_handlers={HTTPException: _refused, InvalidInput: _invalid, Exception: _broken},
        lifespan=lambda _: _sampling(reader),
    )
    made.router.redirect_slashes = False
    return Guard(made)


def _registry(cache: PagedKVCache) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector(cache))
    return registry


@contextlib.asynccontextmanager
async def _sampling(reader: Reader) -> AsyncIterator[None]:
    """Keeps the curve growing while nobody looks."""

    async def sample() -> None:
        while True:
            try:
                await run_in_threadpool(reader.sample)
            except Exception:  # the curve gets a gap, and whoever looks is told why
                _log.exception("the pool cannot be sampled")
            await asyncio.sleep(HISTORY_SECONDS)

    task = asyncio.create_task(sample())
    try:
        yield
    finally:
        task.cancel()


# Reading ------------------------------------------------------------------------------------------------------------


async def _to_page(_: Request) -> Response:
    return RedirectResponse("ui", status_code=307)


def _page() -> Callable[[Request], Response]:
    html, policy = page()

    def show(_: Request) -> Response:
        return HTMLResponse(html, headers={"content-security-policy": policy})

    return show


def _metrics(registry: CollectorRegistry) -> Callable[[Request], Response]:
    def scrape(request: Request) -> Response:
        try:
            encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # raised for versions that are none
            encoder, content_type = choose_encoder("")
        names = request.query_params.getlist("name[]")
        chosen = registry.restricted_registry(names) if names else registry
        return Response(encoder(chosen), headers={"content-type": content_type})

    return scrape


async def _alive(_: Request) -> Response:
    """The process answers; whether the pool does is the business of ``/readyz``."""
    return PlainTextResponse("ok\n")


def _ready(reader: Reader, workload: Workload | None) -> Callable[[Request], Any]:
    async def ready(_: Request) -> Response:
        reasons = []
        try:
            stats = await asyncio.wait_for(run_in_threadpool(reader.cache.stats), READY_SECONDS)
        except TimeoutError:
            reasons.append(f"the pool did not answer within {READY_SECONDS} s")
        except Exception as error:  # whatever a fence may raise
            _log.exception("the pool cannot be read")
            reasons.append(f"the pool cannot be read: {type(error).__name__}")
        else:
            if stats.counters.invariant_violations:
                reasons.append(f"{stats.counters.invariant_violations} checks of the pool failed")
        if workload is not None and workload.failure is not None:
            reasons.append(f"the workload failed: {workload.failure}")
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    return ready


def _document(name: str, reader: Reader) -> Callable[[Request], Response]:
    def show(request: Request) -> Response:
        return JSONResponse(DOCUMENTS[name](reader, request.query_params))

    return show


# Doing --------------------------------------------------------------------------------------------------------------


def _actions(cache: PagedKVCache, workload: Workload | None) -> Mapping[str, Callable[[], Document]]:
    def check() -> Document:
        try:
            cache.manager.check()
        except InternalError as error:
            return {"sound": False, "problem": str(error)}
        return {"sound": True, "problem": None}

    def dump() -> Document:
        return to_document(take(cache.manager, cache.layout.block_bytes))

    found: dict[str, Callable[[], Document]] = {"check": check, "dump": dump}
    if workload is not None:
        found |= {"pause": lambda: _set(workload.pause), "resume": lambda: _set(workload.resume)}
    return found


def _set(verb: Callable[[], None]) -> Document:
    verb()
    return {"done": True}


def _action(name: str, act: Callable[[], Document], token: str | None) -> Callable[[Request], Response]:
    def run(request: Request) -> Response:
        if token is None:
            raise HTTPException(403, "there is no token: set service.token to allow this")
        if not _same(request.headers.get("authorization", ""), f"Bearer {token}"):
            _log.warning("refused without the token", extra={"action": name})
            raise HTTPException(
                401, "this needs the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )
        _log.info("asked for by who has the token", extra={"action": name})
        return JSONResponse(act())

    return run


def _same(given: str, expected: str) -> bool:
    """In a time that depends on neither text: digests have one length."""
    return hmac.compare_digest(sha256(given.encode("latin-1")).digest(), sha256(expected.encode()).digest())


# Refusing -----------------------------------------------------------------------------------------------------------


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"{type(error).__name__}: the log of the process says more"}, 500)
