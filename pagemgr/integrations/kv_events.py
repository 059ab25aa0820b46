"""Events of the prefix cache over ZMQ, in the format of vLLM, which routers such as llm-d, Dynamo and AIBrix read.

    publisher = KvEventPublisher()                  pip install 'pagemgr[kv_events]'
    publisher.publish(events)                       after each step, what was drained

Every batch is one message ``(topic, sequence number, payload)`` on a PUB socket: the number is 8 bytes, big-endian, and
counts up from 0. The payload is the MessagePack array ``[timestamp, events]`` or ``[timestamp, events, rank]``. An
event is a map with its name under ``"type"`` (``Wire.maps``, vLLM from pull request 42892 on), or an array that begins
with its name (``Wire.arrays``, before).

A PUB socket never waits: who is slow, or comes late, misses messages. It sees so by the numbers, and asks the ROUTER
socket: ``(empty, first number)`` brings every batch from there on that is still kept, then an end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, Self

from pagemgr.errors import ConfigError, StepOrderError
from pagemgr.events import Event

try:
    import msgspec
    import zmq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'pagemgr[kv_events]'", name=error.name) from error

_log = logging.getLogger("pagemgr")

END = (-1).to_bytes(8, "big", signed=True)
"""In place of a sequence number: nothing more is kept."""

_MEDIUM = {"device": "GPU", "host": "CPU"}
_LINGER_MS = 1000


class Wire(Enum):
    """How events look on the wire."""

    maps = "maps"
    """vLLM with pull request 42892; a replayed message has its topic in front."""
    arrays = "arrays"
    """Versions before; a replayed message has no topic."""


def encode(events: Iterable[Event], wire: Wire, timestamp: float, rank: int | None = None) -> bytes:
    """One batch. ``timestamp`` in seconds since 1970; ``rank`` is the data-parallel one, where there are several.

    A block is named by the last 8 bytes of its name, as an unsigned number: every reader takes those. What moved
    between tiers is stored in one, without token ids, as readers know them by then, and removed from the other.
    """
    said = [_shaped(name, fields, wire) for event in events for name, fields in _messages(event)]
    return msgspec.msgpack.encode([timestamp, said] if rank is None else [timestamp, said, rank])


def _messages(event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
    if event.kind == "stored":
        yield "BlockStored", _stored(event, event.tier)
    elif event.kind == "removed":
        yield "BlockRemoved", _removed(event)
    elif event.kind == "moved":
        yield "BlockStored", _stored(event, str(event.target))
        yield "BlockRemoved", _removed(event)
    else:
        yield "AllBlocksCleared", {}


def _stored(event: Event, tier: str) -> dict[str, Any]:
    return {
        "block_hashes": [_short(name) for name in event.names],
        "parent_block_hash": None if event.parent is None else _short(event.parent),
        "token_ids": event.tokens if event.kind == "stored" else (),
        "block_size": event.block_size,
        "lora_id": None,
        "medium": _medium(tier),
        "lora_name": None,
        "extra_keys": None,
        "group_idx": event.group,
    }


def _removed(event: Event) -> dict[str, Any]:
    return {
        "block_hashes": [_short(name) for name in event.names],
        "medium": _medium(event.tier),
        "group_idx": event.group,
    }


def _shaped(name: str, fields: dict[str, Any], wire: Wire) -> dict[str, Any] | list[Any]:
    """Optional fields are left out where they say nothing: of arrays, those at the end."""
    if wire is Wire.maps:
        return {"type": name} | {key: value for key, value in fields.items() if key != "extra_keys"}
    optional = ("extra_keys", "group_idx")
    whole = bool(fields.get("group_idx"))
    return [name, *(value for key, value in fields.items() if whole or key not in optional)]


def _short(name: bytes) -> int:
    return int.from_bytes(name[-8:], "big")


def _medium(tier: str) -> str:
    return _MEDIUM.get(tier, "STORAGE")


class KvEventPublisher:
    """Sends batches of events, and sends again those that somebody missed, until ``close``.

    ``endpoint`` and ``replay_endpoint`` are ZMQ addresses to listen on; they name this machine alone unless told
    otherwise, and the port ``*`` takes a free one. The last ``keep`` batches can be asked for again; a subscriber that
    is more than ``high_water`` batches behind loses some. Raises ``ConfigError`` where it cannot listen.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:5557",
        replay_endpoint: str = "tcp://127.0.0.1:5558",
        *,
        topic: str = "",
        wire: Wire = Wire.maps,
        rank: int | None = None,
        keep: int = 10_000,
        high_water: int = 100_000,
    ) -> None:
        self._topic, self._wire, self._rank = topic.encode(), wire, rank
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=keep)
        self._next = 0
        self._lock = threading.Lock()
        self._context = zmq.Context()
        try:
            self._pub = self._listening(zmq.PUB, endpoint, high_water)
            router = self._listening(zmq.ROUTER, replay_endpoint, keep + 1)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where the batches are, with the port that was taken."""
        self.replay_endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._replay, args=(router,), name="pagemgr kv events", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[Event]) -> None:
        """Send one batch, in this order; nothing if it is empty. Never waits for anybody. Any thread may call it."""
        if not events:
            return
        payload = encode(events, self._wire, time.time(), self._rank)
        with self._lock:
            if self._pub.closed:
                raise StepOrderError("the publisher is closed")
            number = self._next.to_bytes(8, "big")
            self._next += 1
            self._kept.append((number, payload))
            self._pub.send_multipart((self._topic, number, payload))

    def close(self) -> None:
        """Stop listening, once what was sent has left or a second has passed. Closing twice is fine."""
        with self._lock:
            self._pub.close()
        self._context.term()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listening(self, kind: int, endpoint: str, high_water: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, high_water)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"KV events cannot listen on {endpoint}: {error.strerror}") from error
        return socket

    def _replay(self, router: zmq.Socket[bytes]) -> None:
        """Answers requests until the context ends."""
        with router:
            while True:
                try:
                    client, *request = router.recv_multipart()
                    for message in self._asked_for(request):
                        router.send_multipart((client, b"", *message))
                except zmq.ContextTerminated:
                    return
                except zmq.ZMQError:
                    _log.exception("a request for KV events was not answered")

    def _asked_for(self, request: Sequence[bytes]) -> Iterator[tuple[bytes, ...]]:
        """What is kept from a number on, and the end; nothing for what is no request."""
        if len(request) != 2 or request[0] or len(request[1]) != 8:
            _log.debug("not a request for KV events: %r", request)
            return
        with self._lock:
            wanted = [batch for batch in self._kept if batch[0] >= request[1]]
        with_topic = self._wire is Wire.maps
        for number, payload in wanted:
            yield (self._topic, number, payload) if with_topic else (number, payload)
        yield (b"", END, b"") if with_topic else (END, b"")
