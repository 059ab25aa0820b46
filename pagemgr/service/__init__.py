"""A pool to look at: a page in the browser, a JSON API, metrics and health, read-only unless you have the token.

server = cache.serve(port=8620)                                      # from an engine: a server in a thread
engine_app.mount("/kv", pagemgr.service.app(cache))                  # in an ASGI server that is there already
pagemgr serve --replay trace.jsonl                                   # a process that owns a pool and a workload

Needs ``pip install 'pagemgr[serve]'``.
"""

try:
    from .application import app
    from .runner import Workload
    from .server import Server, serve
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio", "h11"):
        raise
    from pagemgr.errors import ConfigError

    raise ConfigError(f"the service needs {error.name}: pip install 'pagemgr[serve]'") from error

__all__ = ["Server", "Workload", "app", "serve"]
