"""A pool to look at: a page in the browser, a JSON API, metrics and health, read-only unless you have the token.

server = cache.serve(port=8620)                                      # from an engine: a server in a thread
engine_app.mount("/kv", pagemgr.service.app(cache))                  # in an ASGI server that is there already
pagemgr serve --replay trace.jsonl                                   # a process that owns a pool and a workload

What serves needs ``pip install 'pagemgr[serve]'``, and is loaded when it is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pagemgr.errors import ConfigError

if TYPE_CHECKING:
    from .application import app
    from .runner import Workload
    from .server import Server, serve

__all__ = ["Server", "Workload", "app", "serve"]

_LAZY = {"Server": "server", "Workload": "runner", "app": "application", "serve": "server"}
_EXTRA = {"anyio", "h11", "starlette", "uvicorn"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in _EXTRA:
            raise
        raise ConfigError(f"the service needs {missing}: pip install 'pagemgr[serve]'") from error
