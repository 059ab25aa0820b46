"""``pagemgr serve``: a process that owns a pool, runs a workload on it, and lets itself be looked at."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from pagemgr.cache import PagedKVCache
from pagemgr.config import load
from pagemgr.errors import ConfigError
from pagemgr.integrations.telemetry import observe
from pagemgr.service import Workload, serve
from pagemgr.service.traffic import trace_steps
from pagemgr.traces import read_trace
from pagemgr.workload import chat

from .options import setting_options
from .toy_engine import ToyEngine
from .toy_model import VOCABULARY

DEMO, REPLAY = (str(Path(__file__).with_name(name)) for name in ("demo.toml", "replay.toml"))
CONVERSATIONS, ARRIVALS = 120, 700
WIDEST = 1024
"""Elements of a hidden state, beyond which the demo's model would keep a CPU busy for seconds a step."""


@click.command("serve")
@click.option(
    "--replay",
    "trace",
    metavar="TRACE",
    type=click.Path(exists=True, dir_okay=False),
    help="Serve a pool with the traffic of this trace, again and again, instead of the demo's conversations.",
)
@setting_options
def command(trace: str | None, config_file: str | None, overrides: dict[str, object]) -> None:
    """Own a pool, run a workload on it, and serve a page, a JSON API, metrics and health until it is stopped.

    \b
    pagemgr serve                                              the demo's conversations, on the CPU
    pagemgr serve --replay trace.jsonl --pool.num-blocks 20000
    PAGEMGR_SERVICE__TOKEN=$(openssl rand -hex 16) pagemgr serve

    It listens on 127.0.0.1 and is read-only; with a token, whoever has it may check, dump, pause and resume. An engine
    serves its own pool by cache.serve().
    """
    config = load(config_file or (DEMO if trace is None else REPLAY), overrides).config
    cache = PagedKVCache(config)
    observe(cache)
    name = "the demo's conversations" if trace is None else trace
    steps = _demo_steps(cache) if trace is None else trace_steps(cache, read_trace(trace))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Workload(steps, name) as workload, serve(cache, workload=workload) as server:
        root = server.url.removesuffix("/ui")
        click.echo(f"{name} on a pool of {cache.manager.tiers[0].pool.num_blocks:,} blocks; ctrl-C stops it")
        click.echo(f"  page      {server.url}\n  metrics   {root}/metrics\n  top       pagemgr top {root}")
        stop.wait()


def _demo_steps(cache: PagedKVCache) -> Iterator[None]:
    """The demo's engine, over and over, with other conversations each time."""
    model = cache.config.model
    if cache.device.type != "cpu" or model.num_q_heads * model.head_dim > WIDEST:
        raise ConfigError(
            f"the demo's conversations compute attention on the CPU, for models at most {WIDEST} wide: set device to "
            "cpu and a smaller model, or give --replay TRACE, which computes nothing"
        )
    torch.set_num_threads(1)  # tensors this small are only slowed down by more

    def steps() -> Iterator[None]:
        for seed in itertools.count():
            workload = chat(seed, CONVERSATIONS, VOCABULARY, cache.manager.max_seq_len, ARRIVALS)
            engine = ToyEngine(cache, workload, seed, verify_every=len(workload))
            while engine.busy:
                engine.tick()
                yield

    return steps()
