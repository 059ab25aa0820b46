"""KV events in vLLM's format: bytes written out by hand from its documentation, and the sockets they travel on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

msgspec = pytest.importorskip("msgspec", reason="needs pip install 'pagemgr[kv_events]'")
zmq = pytest.importorskip("zmq", reason="needs pip install 'pagemgr[kv_events]'")

from pagemgr.errors import ConfigError, StepOrderError  # noqa: E402 - what is optional comes first
from pagemgr.events import Event  # noqa: E402
from pagemgr.integrations.kv_events import END, KvEventPublisher, Wire, encode  # noqa: E402

ROOT, FIRST, SECOND = (bytes(24) + tail for tail in (b"\xff" * 8, bytes(range(1, 9)), bytes(7) + b"\x05"))
BOTH = pytest.mark.parametrize("wire", Wire)


def event(kind: str, names: tuple[bytes, ...] = (), **fields: Any) -> Event:
    known = {"number": 0, "tier": "device", "reason": "commit", "parent": None, "tokens": (), "block_size": 2}
    return Event(kind=kind, names=names, **(known | {"group": 0, "target": None} | fields))


STORED = event("stored", (FIRST, SECOND), parent=ROOT, tokens=(1, 200, 70_000, 3))
REMOVED = event("removed", (SECOND,), tier="host")

# The golden bytes -----------------------------------------------------------------------------------------------------
#
# 9n array, 8n map, an text, c0 none, 00-7f number, cc 1, ce 4 and cf 8 bytes of number, cb float: msgpack's spec.md.


def text(word: str) -> str:
    assert len(word) < 32
    return f"{0xA0 + len(word):02x}" + word.encode().hex()


TIME = "cb 3ff8000000000000"  # 1.5
HASHES = "92 cf 0102030405060708 05"
PARENT = "cf ffffffffffffffff"
TOKENS = "94 01 cc c8 ce 00011170 03"

GOLDEN = {
    ("stored", Wire.arrays): f"98 {text('BlockStored')} {HASHES} {PARENT} {TOKENS} 02 c0 {text('GPU')} c0",
    ("stored", Wire.maps): f"89 {text('type')} {text('BlockStored')} {text('block_hashes')} {HASHES} "
    f"{text('parent_block_hash')} {PARENT} {text('token_ids')} {TOKENS} {text('block_size')} 02 "
    f"{text('lora_id')} c0 {text('medium')} {text('GPU')} {text('lora_name')} c0 {text('group_idx')} 00",
    ("removed", Wire.arrays): f"93 {text('BlockRemoved')} 91 05 {text('CPU')}",
    ("removed", Wire.maps): f"84 {text('type')} {text('BlockRemoved')} {text('block_hashes')} 91 05 "
    f"{text('medium')} {text('CPU')} {text('group_idx')} 00",
    ("cleared", Wire.arrays): f"91 {text('AllBlocksCleared')}",
    ("cleared", Wire.maps): f"81 {text('type')} {text('AllBlocksCleared')}",
}
EVENTS = {"stored": STORED, "removed": REMOVED, "cleared": event("cleared")}


@pytest.mark.parametrize(("kind", "wire"), GOLDEN)
def test_golden_bytes(kind: str, wire: Wire) -> None:
    golden = GOLDEN[kind, wire]
    assert encode([EVENTS[kind]], wire, 1.5) == bytes.fromhex(f"92 {TIME} 91 {golden}")
    assert encode([EVENTS[kind]], wire, 1.5, rank=3) == bytes.fromhex(f"93 {TIME} 91 {golden} 03")


@BOTH
def test_a_batch_keeps_its_order(wire: Wire) -> None:
    body = GOLDEN["removed", wire] + GOLDEN["stored", wire]
    assert encode([REMOVED, STORED], wire, 1.5) == bytes.fromhex(f"92 {TIME} 92 {body}")


@BOTH
def test_what_moved_is_stored_without_tokens_and_then_removed(wire: Wire) -> None:
    moved = event("moved", (FIRST,), target="host")
    _, (stored, removed) = msgspec.msgpack.decode(encode([moved], wire, 1.5))
    values = [list(said.values()) if wire is Wire.maps else said for said in (stored, removed)]
    assert values[0][:8] == ["BlockStored", [0x0102030405060708], None, [], 2, None, "CPU", None]
    assert values[1][:3] == ["BlockRemoved", [0x0102030405060708], "GPU"]


def test_groups_are_told_where_there_are_several() -> None:
    stored, removed = event("stored", (FIRST,), tokens=(1, 2), group=3), event("removed", (FIRST,), group=3)
    _, said = msgspec.msgpack.decode(encode([stored, removed], Wire.arrays, 1.5))
    assert [one[-2:] for one in said] == [[None, 3], ["GPU", 3]]
    _, said = msgspec.msgpack.decode(encode([stored, removed], Wire.maps, 1.5))
    assert [one["group_idx"] for one in said] == [3, 3]


def test_tiers_below_are_storage() -> None:
    _, (said,) = msgspec.msgpack.decode(encode([event("removed", (FIRST,), tier="disk")], Wire.maps, 1.5))
    assert said["medium"] == "STORAGE"


def test_subscribers_of_both_kinds_can_read_it() -> None:
    """Structures of the shape that vLLM's documentation gives for a subscriber."""

    def subscriber(**shape: Any) -> Any:
        class Stored(msgspec.Struct, tag="BlockStored", **shape):
            block_hashes: list[int]
            parent_block_hash: int | None
            token_ids: list[int]
            block_size: int
            lora_id: int | None
            medium: str | None

        class Removed(msgspec.Struct, tag="BlockRemoved", **shape):
            block_hashes: list[int]
            medium: str | None

        class Cleared(msgspec.Struct, tag="AllBlocksCleared", **shape):
            pass

        return msgspec.msgpack.Decoder(tuple[float, list[Stored | Removed | Cleared]])

    for wire, shape in ((Wire.arrays, {"array_like": True}), (Wire.maps, {})):
        _, (stored, removed, cleared) = subscriber(**shape).decode(encode(EVENTS.values(), wire, 1.5))
        assert (stored.token_ids, stored.medium, stored.block_size) == ([1, 200, 70_000, 3], "GPU", 2)
        assert (removed.block_hashes, removed.medium) == ([5], "CPU")
        assert type(cleared).__name__ == "Cleared"


# The sockets ----------------------------------------------------------------------------------------------------------


class Listener:
    """A router: hears batches, and asks for those that it missed."""

    def __init__(self, publisher: KvEventPublisher, topic: str = "") -> None:
        self.context = zmq.Context()
        self.sub, self.req = self.context.socket(zmq.SUB), self.context.socket(zmq.REQ)
        for socket, endpoint in ((self.sub, publisher.endpoint), (self.req, publisher.replay_endpoint)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, 5000)
            socket.connect(endpoint)
        self.sub.setsockopt_string(zmq.SUBSCRIBE, topic)

    def heard(self) -> tuple[bytes, int, Any]:
        topic, number, payload = self.sub.recv_multipart()
        return topic, int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)

    def ask(self, start: int) -> list[list[bytes]]:
        """Every frame of the answer, its end included."""
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 5000)
        dealer.connect(self.req.getsockopt_string(zmq.LAST_ENDPOINT))
        dealer.send_multipart((b"", start.to_bytes(8, "big")))
        answer = []
        while not answer or END not in answer[-1]:
            empty, *frames = dealer.recv_multipart()
            assert empty == b""
            answer.append(frames)
        dealer.close()
        return answer


@pytest.fixture(params=Wire, ids=lambda wire: wire.value)
def publisher(request: pytest.FixtureRequest) -> Iterator[KvEventPublisher]:
    free = "tcp://127.0.0.1:*"
    with KvEventPublisher(free, free, topic="kv@pod@model", wire=request.param, keep=4) as publisher:
        yield publisher


@pytest.fixture
def listener(publisher: KvEventPublisher) -> Iterator[Listener]:
    listener = Listener(publisher, "kv@")
    yield listener
    listener.context.destroy(linger=0)


def joined(publisher: KvEventPublisher, listener: Listener) -> int:
    """Publish until the subscription has arrived; the number of the first batch that was heard."""
    listener.sub.setsockopt(zmq.RCVTIMEO, 20)
    while True:
        publisher.publish([REMOVED])
        try:
            _, number, _ = listener.heard()
        except zmq.Again:
            continue
        listener.sub.setsockopt(zmq.RCVTIMEO, 5000)
        return number


def test_batches_are_numbered_without_gaps(publisher: KvEventPublisher, listener: Listener) -> None:
    first = joined(publisher, listener)
    before = time.time()
    for _ in range(20):
        publisher.publish([STORED, REMOVED])
    publisher.publish([])
    heard = [listener.heard() for _ in range(20)]
    assert [number for _, number, _ in heard] == list(range(first + 1, first + 21))
    assert {topic for topic, _, _ in heard} == {b"kv@pod@model"}
    assert all(len(batch[1]) == 2 and before <= batch[0] <= time.time() for _, _, batch in heard)


def test_what_was_missed_is_replayed_as_far_as_it_is_kept(publisher: KvEventPublisher, listener: Listener) -> None:
    for _ in range(6):
        publisher.publish([STORED])
    newest = [number.to_bytes(8, "big") for number in (2, 3, 4, 5)]
    *answer, end = listener.ask(0)
    maps = publisher._wire is Wire.maps
    assert [frames[-2] for frames in answer] == newest
    assert [frames[:-2] for frames in answer] == [[b"kv@pod@model"] if maps else []] * 4
    assert end == ([b""] if maps else []) + [END, b""]
    assert [msgspec.msgpack.decode(frames[-1])[1][0] for frames in answer] == [
        msgspec.msgpack.decode(encode([STORED], publisher._wire, 0.0))[1][0]
    ] * 4
    assert [frames[-2] for frames in listener.ask(5)] == [newest[-1], END]
    assert [frames[-2] for frames in listener.ask(6)] == [END]


def test_a_client_that_waits_for_one_answer_gets_the_first(publisher: KvEventPublisher, listener: Listener) -> None:
    """What a REQ socket may do: it puts the empty frame itself."""
    publisher.publish([STORED])
    listener.req.send((0).to_bytes(8, "big"))
    assert listener.req.recv_multipart()[-2] == bytes(8)


@pytest.mark.parametrize("frames", [(b"",), (b"", b"short"), (b"full", bytes(8)), (b"", bytes(8), b"more"), (b"x",)])
def test_what_is_no_request_disturbs_nobody(
    publisher: KvEventPublisher, listener: Listener, frames: tuple[bytes, ...]
) -> None:
    stranger = listener.context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(publisher.replay_endpoint)
    stranger.send_multipart(frames)
    publisher.publish([STORED])
    assert [answer[-2] for answer in listener.ask(0)] == [bytes(8), END]
    stranger.close()


def test_many_threads_publish(publisher: KvEventPublisher, listener: Listener) -> None:
    first = joined(publisher, listener)
    threads = [threading.Thread(target=lambda: [publisher.publish([REMOVED]) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [listener.heard()[1] for _ in range(200)] == list(range(first + 1, first + 201))


def test_nobody_has_to_listen(publisher: KvEventPublisher) -> None:
    for _ in range(1000):
        publisher.publish([STORED])
    assert len(publisher._kept) == 4


def test_it_listens_on_this_machine_alone() -> None:
    defaults = KvEventPublisher.__init__.__defaults__
    assert defaults is not None
    assert all(endpoint.startswith("tcp://127.0.0.1:") for endpoint in defaults)


def test_an_address_in_use_is_named(publisher: KvEventPublisher) -> None:
    for endpoints in ((publisher.endpoint, "tcp://127.0.0.1:*"), ("tcp://127.0.0.1:*", publisher.replay_endpoint)):
        with pytest.raises(ConfigError, match=r"cannot listen on tcp://127\.0\.0\.1:\d+: Address already in use"):
            KvEventPublisher(*endpoints)


def test_closing_frees_the_address_and_may_be_repeated() -> None:
    publisher = KvEventPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    publisher.close()
    publisher.close()
    with pytest.raises(StepOrderError, match="closed"):
        publisher.publish([STORED])
    KvEventPublisher(publisher.endpoint, publisher.replay_endpoint).close()
