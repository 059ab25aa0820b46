"""Traces and their replay on small hand-made files; the real ones are in tests/differential."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pagemgr.cli.main import main
from pagemgr.errors import InternalError, InvalidInput
from pagemgr.replay import replay
from pagemgr.routes import Routes
from pagemgr.traces import TokenSource, read_trace


def write(path: Path, *rows: dict[str, object]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def mooncake(ids: list[int], inputs: int, outputs: int = 3) -> dict[str, object]:
    return {"timestamp": 0, "input_length": inputs, "output_length": outputs, "hash_ids": ids}


def test_equal_ids_are_equal_tokens_and_the_rest_is_unique(tmp_path: Path) -> None:
    agentic = {"timestamp": 1.5, "input_length": 150, "output_length": 2, "hash_runs": [[7, 2]]}
    requests = read_trace(write(tmp_path / "t.jsonl.gz", mooncake([4, 5], 700), agentic, mooncake([4], 512)))
    source = TokenSource()
    first, second, third = (source.prompt(request) for request in requests)
    assert first.tolist() == [4] * 512 + [5] * 188
    assert second[:128].tolist() == [7] * 64 + [8] * 64
    assert len(set(second[128:].tolist())) == 22
    assert second[128:].min() >= 2**30
    assert np.array_equal(third, first[:512])
    assert source.unique(2).tolist() == [2**30 + 22, 2**30 + 23]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a request"),
        ("[]", "line 2: not a request"),
        ('{"input_length": 3}', "line 2: not a request of a known schema .KeyError"),
        ('{"input_length": 0, "output_length": 1}', r"line 2: input_length must be at least 1.*\(0, 1\)"),
        ('{"input_length": 9, "output_length": 1, "hash_ids": [-1]}', r"line 2: ids must be in \[0, 1073741824\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(mooncake([1], 5)) + "\n" + line + "\n")
    with pytest.raises(InvalidInput, match=message):
        read_trace(path)


def test_an_empty_or_broken_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InvalidInput, match="has no requests"):
        read_trace(empty)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(mooncake([1], 5)).encode())[:-9])
    with pytest.raises(InvalidInput, match="cannot read the trace"):
        read_trace(cut)


def test_hits_waste_and_contiguous_memory_by_hand(tmp_path: Path) -> None:
    """Blocks of 256: request 1 misses; 2 hits the two blocks of id 4; 3 is larger than the pool."""
    rows = [mooncake([4], 512, 100), mooncake([4, 9], 700, 4), mooncake([1] * 9, 4500, 1)]
    result = replay(read_trace(write(tmp_path / "t.jsonl", *rows)), usable_blocks=16, block_size=256)
    assert (result.requests, result.skipped, result.longest) == (3, 1, 4500)
    assert result.stats.counters.prefix_hit_tokens == 512
    assert result.stats.counters.prefix_query_tokens == 512 + 700
    assert (result.held_slots, result.held_tokens) == (3 * 256 + 3 * 256, 611 + 703)
    assert result.contiguous_slots == 2 * 4500
    assert [(s.used, s.cached) for s in result.samples] == [(3, 0), (3, 0)]


def test_with_data_compares_every_token_on_both_sides_of_a_move(tmp_path: Path) -> None:
    rows = [mooncake([4], 512, 10), mooncake([4, 9], 700, 4), mooncake([4, 9, 3], 1100, 0)]
    requests = read_trace(write(tmp_path / "t.jsonl", *rows))
    result = replay(requests, usable_blocks=40, block_size=32, with_data=True)
    assert result.compared_tokens == 2 * (521 + 703 + 1100) + 512 + 672
    assert result.stats.counters.swapped_blocks["out"] > 0
    assert replay(requests, 40, 32).stats.hit_ratio == result.stats.hit_ratio


def test_with_data_notices_wrong_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = read_trace(write(tmp_path / "t.jsonl", mooncake([4], 512)))
    move = Routes.move

    def corrupting(self: Routes, source: torch.Tensor, target: torch.Tensor, pairs: np.ndarray) -> None:
        move(self, source, target, pairs)
        target[pairs[-1, 1]] += 1

    monkeypatch.setattr(Routes, "move", corrupting)
    with pytest.raises(InternalError, match="does not hold in host what was written"):
        replay(requests, usable_blocks=40, block_size=32, with_data=True)


def test_command_prints_a_table_and_json(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.gz", *[mooncake([4, i], 700, 5) for i in range(20)])
    arguments = ["replay", str(path), "--blocks", "64", "--block-size", "64"]
    plain = CliRunner().invoke(main, arguments)
    assert plain.exit_code == 0, plain.output
    assert "hit ratio" in plain.stdout
    printed = CliRunner().invoke(main, [*arguments, "--with-data", "--json"])
    answer = json.loads(printed.stdout)
    assert answer["hit_ratio"] == round(19 * 512 / (20 * 700), 4)
    assert answer["requests"] == len(answer["over_time"]) == 20
    assert answer["invariant_violations"] == 0


def test_command_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("nonsense\n")
    result = CliRunner().invoke(main, ["replay", str(path), "--blocks", "64", "--block-size", "64"])
    assert result.exit_code == 2
    assert "line 1" in result.stderr
