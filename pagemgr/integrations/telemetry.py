"""What went on between a cache and its memory, as log records and as OpenTelemetry spans: refusals, swaps, tier copies.

pagemgr.integrations.telemetry.observe(cache)

Nothing is watched until this is called, and of the hot path only ``reserve`` is wrapped then, which says something only
when it is refused. Spans are made where ``opentelemetry`` can be imported (``pip install 'pagemgr[otel]'``); who
receives them is the business of the program's own OpenTelemetry setup.

    span                    log record, level         attributes
    pagemgr.reserve         reserve: failed, warning  reason, requested, available, fenced, tier
    pagemgr.swap            swapped out, info         direction, sequences, blocks, bytes, seconds
    pagemgr.tier.copy       copied between tiers, debug  way, blocks, bytes, seconds

A failed one has the attribute ``error`` and, as a span, the status and the exception. ``seconds`` are those of the
call: on a GPU the bytes may still be under way when it returns.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pagemgr.cache import PagedKVCache
from pagemgr.errors import OutOfBlocks, OutOfSequences, SequenceTooLong

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_log = logging.getLogger("pagemgr.cache")
_REFUSALS = {OutOfBlocks: "out_of_blocks", OutOfSequences: "out_of_sequences", SequenceTooLong: "sequence_too_long"}

Figures = dict[str, str | int | float]
Verb = Callable[..., Any]


def observe(cache: PagedKVCache, tracer: Tracer | None = None) -> None:
    """Watch a cache from now on. ``tracer`` is the one of the global OpenTelemetry provider unless given."""
    watch = _Watch(cache, _tracer() if tracer is None else tracer)
    for owner, name, wrap in (
        (cache.manager, "reserve", watch.refusals),
        (cache, "swap_out", functools.partial(watch.swap, "out")),
        (cache, "swap_in", functools.partial(watch.swap, "in")),
        (cache.storage, "execute", watch.copies),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))


def _tracer() -> Tracer | None:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("pagemgr")


class _Watch:
    """Wraps verbs of one cache."""

    def __init__(self, cache: PagedKVCache, tracer: Tracer | None) -> None:
        self._cache = cache
        self._tracer = tracer

    def refusals(self, reserve: Verb) -> Verb:
        @functools.wraps(reserve)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return reserve(*args, **kwargs)
            except (OutOfBlocks, OutOfSequences, SequenceTooLong) as error:
                with self._span("pagemgr.reserve", "reserve", logging.WARNING) as figures:
                    figures["reason"] = next(reason for kind, reason in _REFUSALS.items() if isinstance(error, kind))
                    figures.update(vars(error))
                    raise

        return watched

    def swap(self, direction: str, verb: Verb) -> Verb:
        @functools.wraps(verb)
        def watched(*args: Any, **kwargs: Any) -> None:
            counters = self._cache.manager.counters
            blocks, sequences = counters.swapped_blocks[direction], counters.swapped_sequences[direction]
            with self._span("pagemgr.swap", f"swapped {direction}", logging.INFO) as figures:
                figures["direction"] = direction
                verb(*args, **kwargs)
                moved = counters.swapped_blocks[direction] - blocks
                figures["sequences"] = counters.swapped_sequences[direction] - sequences
                figures |= {"blocks": moved, "bytes": moved * self._cache.layout.block_bytes}

        return watched

    def copies(self, execute: Verb) -> Verb:
        @functools.wraps(execute)
        def watched(copies: Any, *args: Any, **kwargs: Any) -> Any:
            between = [group for group in copies if group.source != group.target]
            if not between:
                return execute(copies, *args, **kwargs)
            with self._span("pagemgr.tier.copy", "copied between tiers", logging.DEBUG) as figures:
                blocks = sum(len(group.pairs) for group in between)
                ways = dict.fromkeys(f"{group.source} to {group.target}" for group in between)
                figures |= {"way": ", ".join(ways), "blocks": blocks, "bytes": blocks * self._cache.layout.block_bytes}
                return execute(copies, *args, **kwargs)

        return watched

    @contextmanager
    def _span(self, name: str, message: str, level: int) -> Iterator[Figures]:
        """Times what is inside; says it once, with the figures that are filled in meanwhile, failed or not."""
        figures: Figures = {}
        started = time.perf_counter()
        failure: Exception | None = None
        with nullcontext() if self._tracer is None else self._tracer.start_as_current_span(name) as span:
            try:
                yield figures
            except Exception as error:
                failure = error
                raise
            finally:
                figures["seconds"] = time.perf_counter() - started
                if failure is not None:
                    figures["error"] = type(failure).__name__
                    level, message = logging.WARNING, f"{message}: failed"
                _log.log(level, message, extra=figures)
                if span is not None:
                    span.set_attributes({f"pagemgr.{name}": value for name, value in figures.items()})
