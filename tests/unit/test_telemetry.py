"""What is observed: refusals, swaps and copies between tiers; as records and spans, and nothing else."""

from __future__ import annotations

import logging

import pytest

import pagemgr
from pagemgr.errors import OutOfBlocks, SequenceTooLong, TransferFailed
from pagemgr.integrations.telemetry import observe
from pagemgr.routes import Routes
from tests.serving import make_cache, run

trace = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the OpenTelemetry SDK: pip install 'pagemgr[dev]'")


@pytest.fixture
def cache() -> pagemgr.PagedKVCache:
    return make_cache()


@pytest.fixture
def spans(cache: pagemgr.PagedKVCache) -> list[object]:
    """Of the observed cache, in the order in which they ended."""
    ended: list[object] = []

    class Keep(trace.SpanProcessor):  # type: ignore[name-defined, misc]
        def on_end(self, span: object) -> None:
            ended.append(span)

    provider = trace.TracerProvider()
    provider.add_span_processor(Keep())
    observe(cache, provider.get_tracer("test"))
    return ended


def told(span: object) -> dict[str, object]:
    return {name.removeprefix("pagemgr."): value for name, value in span.attributes.items()}  # type: ignore[attr-defined]


def test_a_refusal_is_told_and_still_raised(
    cache: pagemgr.PagedKVCache, spans: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    sequences = cache.add_many([()] * 20)
    with pytest.raises(OutOfBlocks) as refused:
        cache.step(sequences, [[1] * 30] * 20)
    (span,) = spans
    figures = told(span)
    assert span.name == "pagemgr.reserve"  # type: ignore[attr-defined]
    assert not span.status.is_ok  # type: ignore[attr-defined]
    assert (figures["reason"], figures["requested"], figures["tier"]) == ("out_of_blocks", 160, "device")
    assert figures["available"] == refused.value.available
    (record,) = caplog.records
    assert (record.levelname, record.reason, record.requested) == ("WARNING", "out_of_blocks", 160)  # type: ignore[attr-defined]
    with pytest.raises(SequenceTooLong):
        cache.step(sequences[:1], [[1] * 65])
    assert told(spans[1])["limit"] == 64


def test_a_swap_and_its_copy_are_told(
    cache: pagemgr.PagedKVCache, spans: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pagemgr.cache")
    sequence = cache.add()
    run(cache, sequence, list(range(10)))
    cache.swap_out([sequence])
    cache.swap_in([sequence])
    assert [span.name for span in spans] == ["pagemgr.tier.copy", "pagemgr.swap"] * 2  # type: ignore[attr-defined]
    copy, swap = map(told, spans[:2])
    block = cache.layout.block_bytes
    assert (swap["direction"], swap["sequences"], swap["blocks"], swap["bytes"]) == ("out", 1, 3, 3 * block)
    assert (copy["way"], copy["blocks"], copy["bytes"]) == ("device to host", 3, 3 * block)
    assert 0 < copy["seconds"] <= swap["seconds"]  # type: ignore[operator]
    assert spans[0].parent.span_id == spans[1].context.span_id  # type: ignore[attr-defined]
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO"] * 2


def test_a_failed_swap_is_told_and_changes_nothing(
    cache: pagemgr.PagedKVCache, spans: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cache.add()
    run(cache, sequence, list(range(10)))

    def broken(*_: object) -> None:
        raise RuntimeError("the bus is on fire")

    monkeypatch.setattr(Routes, "move", broken)
    with pytest.raises(TransferFailed):
        cache.swap_out([sequence])
    assert [told(span)["error"] for span in spans] == ["RuntimeError", "TransferFailed"]
    cache.manager.check()


def test_steps_forks_and_copies_within_a_tier_are_not_told(cache: pagemgr.PagedKVCache, spans: list[object]) -> None:
    sequence = cache.add()
    with cache.step([sequence], [list(range(6))]) as step:
        step.commit()
    children = cache.fork(sequence, 2)
    with cache.step(children, [[1], [2]]) as step:  # copies the tail that they share
        step.commit()
    cache.free([sequence, *children])
    assert spans == []


def test_without_opentelemetry_there_are_records_alone(
    cache: pagemgr.PagedKVCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    caplog.set_level(logging.INFO, "pagemgr.cache")
    observe(cache)
    sequence = cache.add()
    run(cache, sequence, [1, 2])
    cache.swap_out([sequence])
    assert [record.message for record in caplog.records] == ["swapped out"]
