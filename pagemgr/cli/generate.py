"""``pagemgr generate``: text from a model whose K/V cache and attention are pagemgr's, and where the memory went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from pagemgr.cache import PagedKVCache

from .main import Refused
from .output import print_json, print_table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the pool by cause (``tokens`` to ``reserved`` sum to ``pool``), and what they are compared with."""

    tokens: int
    """Slots that hold the K and V of a token."""
    tail_waste: int
    """Slots left in last blocks."""
    free: int
    reserved: int
    """The null block."""
    pool: int
    saved_by_sharing: int
    """What the continuations would need on top if each had its own copy of the prompt."""
    contiguous: int
    """A contiguous cache of the length that the continuations may reach."""
    contiguous_model_limit: int
    """A contiguous cache of the length that the model may reach."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What one run gave."""

    texts: list[str]
    """Prompt and continuation, one for each fork."""
    token_ids: list[list[int]]
    """New tokens alone."""
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    memory: Memory

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all continuations, the prompt's time left out."""
        return sum(map(len, self.token_ids)) / self.decode_seconds


class Ticker:
    """A streamer, as ``generate`` calls it: counts steps and keeps no text."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("generating", total=steps)
        self._prompt_seen = False

    def put(self, _: torch.Tensor) -> None:
        """The prompt first, then one token of every row at a time."""
        self._progress.advance(self._task, int(self._prompt_seen))
        self._prompt_seen = True

    def end(self) -> None:
        """No more tokens."""


@click.command("generate")
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="Folder, or .gguf file.")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("-n", "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to add.")
@click.option("--fork", type=click.IntRange(min=1), default=1, show_default=True, help="How many continuations.")
@click.option("--block-size", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of a block.")
@click.option("--backend", default="auto", show_default=True, help='A name that "pagemgr doctor" lists.')
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: Path, prompt: str, new_tokens: int, fork: int, block_size: int, backend: str, seed: int, as_json: bool
) -> None:
    """Continue a text with a Hugging Face causal LM whose K/V cache and attention are pagemgr's.

    One continuation is the most likely one; several are sampled, and share one copy of the prompt. The model runs on
    the GPU if there is one. Nothing is downloaded: it must be a folder as save_pretrained writes it, with safetensors,
    or a .gguf file (which needs the packages gguf and accelerate as well).
    """
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        loading = progress.add_task(f"loading {model.name}", total=None)
        tokenizer, network = _load(model)
        progress.remove_task(loading)
        result, pool = _generate(network, tokenizer, prompt, new_tokens, fork, block_size, backend, seed, progress)
    if as_json:
        machine = {"backend": pool.backend.name, "device": str(pool.device)}
        print_json({"model": str(model), **machine, **asdict(result), "tokens_per_second": result.tokens_per_second})
        return
    for text in result.texts:
        click.echo(text + "\n")
    click.echo(
        f"{result.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, then {result.tokens_per_second:.1f} "
        f"tokens/s on {pool.device} by {pool.backend.name}\n"
    )
    print_table("memory", ("where it went", "MiB", "share", "blocks"), _pool_rows(result.memory, pool))
    click.echo()
    print_table("and what else it could have been", ("K/V cache", "MiB", "times"), _compared_rows(result.memory))


def _load(model: Path) -> tuple[Any, Any]:
    """Tokenizer and network, from local files only."""
    try:
        import transformers
    except ImportError as error:
        raise Refused(f'generate needs transformers: pip install "pagemgr[hf]" ({error})') from error
    import torch

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, gguf = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
    # Unpacked weights: else the products of quantized ones would decide about speed and rounding.
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto", **gguf, **unpacked
        )
    except (ImportError, OSError, ValueError) as error:
        raise Refused(f"cannot load {model}: {error}") from error
    return tokenizer, network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _generate(
    network: Any,
    tokenizer: Any,
    prompt: str,
    new_tokens: int,
    fork: int,
    block_size: int,
    backend: str,
    seed: int,
    progress: Progress,
) -> tuple[Generated, PagedKVCache]:
    """Run the prompt once, fork it, and go on. The pool has room for all continuations even if they shared nothing."""
    import torch

    from pagemgr.integrations.transformers import NAME, PagedCache

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(network.device)
    length = ids.shape[1]
    if not length:
        raise Refused("the prompt has no tokens")
    longest = length + new_tokens
    blocks = fork * -(-longest // block_size) + 1
    network.set_attn_implementation(NAME)
    cache = PagedCache.for_model(
        network, backend, num_blocks=blocks, block_size=block_size, max_sequences=fork, max_seq_len=longest
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    prefilling = progress.add_task("reading the prompt", total=None)
    if length > 1:  # all but the last token, which generate itself will run
        with torch.no_grad():
            network.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(fork)
    progress.remove_task(prefilling)
    prefilled = time.perf_counter()
    rows = ids.expand(fork, -1)
    out = network.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        past_key_values=cache,
        do_sample=fork > 1,
        max_new_tokens=new_tokens,
        pad_token_id=_padding(tokenizer),
        streamer=Ticker(progress, new_tokens),
    )
    done = time.perf_counter()
    limit = getattr(network.config.get_text_config(decoder=True), "max_position_embeddings", longest)
    result = Generated(
        texts=tokenizer.batch_decode(out, skip_special_tokens=True),
        token_ids=out[:, length:].tolist(),
        prompt_tokens=length,
        prefill_seconds=prefilled - start,
        decode_seconds=done - prefilled,
        memory=_memory(cache.pool, fork * longest, fork * max(limit, longest)),
    )
    cache.reset()
    return result, cache.pool


def _padding(tokenizer: Any) -> int:
    """What ends rows that stop before the others."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return next(known, 0)


def _memory(pool: PagedKVCache, contiguous_slots: int, limit_slots: int) -> Memory:
    device, layout = pool.stats().device, pool.layout
    waste = device.waste_slots * layout.token_bytes
    return Memory(
        tokens=device.used * layout.block_bytes - waste,
        tail_waste=waste,
        free=(device.num_blocks - device.used - device.null) * layout.block_bytes,
        reserved=device.null * layout.block_bytes,
        pool=device.num_blocks * layout.block_bytes,
        saved_by_sharing=device.saved * layout.block_bytes,
        contiguous=contiguous_slots * layout.token_bytes,
        contiguous_model_limit=limit_slots * layout.token_bytes,
    )


def _pool_rows(memory: Memory, pool: PagedKVCache) -> Iterator[tuple[str, str, str, str]]:
    for name in ("tokens", "tail_waste", "free", "reserved", "pool"):
        size = getattr(memory, name)
        yield name.replace("_", " "), _mib(size), f"{size / memory.pool:.1%}", f"{size / pool.layout.block_bytes:,.2f}"


def _compared_rows(memory: Memory) -> Iterator[tuple[str, str, str]]:
    used, saved = memory.tokens + memory.tail_waste, memory.saved_by_sharing
    sizes = {"paged, as it was": used}
    if saved:
        sizes[f"paged, a prompt for each: sharing saved {_mib(saved)} MiB"] = used + saved
    sizes["contiguous, of prompt and new tokens"] = memory.contiguous
    sizes["contiguous, as long as the model allows"] = memory.contiguous_model_limit
    for what, size in sizes.items():
        yield what, _mib(size), f"{size / used:.1f}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.3f}"
