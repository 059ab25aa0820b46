"""The demo's picture: memory over time by cause, paged beside contiguous, on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pagemgr.errors import OperatingError

from .toy_engine import Moment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
INK = "#333333"
# From the palette of Okabe and Ito, which every kind of colour vision tells apart; in grey they differ in brightness.
COLOURS = {
    "tokens in the cache": "#0072b2",
    "reserved, but no token yet": "#e69f00",
    "fenced": "#cc79a7",
    "cached for reuse": "#9fd3f0",
    "free": "#ededed",
}

Parts = dict[str, list[float]]
"""MiB after each step, by what it is; from the bottom up."""


def require_matplotlib() -> None:
    """Raise ``OperatingError`` if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OperatingError("the picture needs matplotlib: pip install 'pagemgr[demo]'") from error


def draw(path: Path, moments: Sequence[Moment], pool_bytes: int, max_seq_len: int) -> None:
    """Write a PNG: where the memory was after each step, and where a contiguous cache would have had it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    paged, contiguous, pool = _paged(moments), _contiguous(moments), pool_bytes / MIB
    figure = Figure(figsize=(10, 5), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _stack(left, paged)
    _stack(right, contiguous)
    top = 1.08 * max(map(sum, zip(*contiguous.values(), strict=True)))
    left.set_ylim(0, max(top, 2 * pool))
    left.set_ylabel("MiB")
    left.set_title(f"pagemgr: blocks as they are needed, in {pool:.0f} MiB", fontsize=11)
    right.set_title(f"contiguous: {max_seq_len:,} tokens for each of the same sequences", fontsize=11)
    for axes in (left, right):
        axes.axhline(pool, color=INK, linestyle="--", linewidth=1)
    right.text(1.01, pool, f"{pool:.0f} MiB", transform=right.get_yaxis_transform(), va="center", color=INK)
    _enlarge(left, paged, pool)
    seen = [label for label in COLOURS if any(paged[label])]
    figure.legend(
        handles=[Patch(color=COLOURS[label], label=label) for label in seen],
        loc="outside lower center",
        ncols=len(seen),
        frameon=False,
        fontsize=11,
    )
    figure.savefig(path, format="png")


def _paged(moments: Sequence[Moment]) -> Parts:
    causes = [moment.causes for moment in moments]
    return {
        "tokens in the cache": [(cause["full"] + cause["open_used"]) / MIB for cause in causes],
        "reserved, but no token yet": [cause["tail_waste"] / MIB for cause in causes],
        "fenced": [cause["fenced"] / MIB for cause in causes],
        "cached for reuse": [cause["cached"] / MIB for cause in causes],
        "free": [(cause["free"] + cause["null"]) / MIB for cause in causes],
    }


def _contiguous(moments: Sequence[Moment]) -> Parts:
    empty = [(moment.contiguous_reserved - moment.contiguous_used) / MIB for moment in moments]
    return {
        "tokens in the cache": [moment.contiguous_used / MIB for moment in moments],
        "reserved, but no token yet": empty,
    }


def _stack(axes: Axes, parts: Parts) -> None:
    sizes = list(parts.values())
    steps = range(1, len(sizes[0]) + 1)
    axes.stackplot(steps, sizes, colors=[COLOURS[label] for label in parts], linewidth=0)
    axes.set_xlim(1, len(steps))
    axes.set_xlabel("step of the engine")
    axes.spines[["top", "right"]].set_visible(False)


def _enlarge(axes: Axes, parts: Parts, pool: float) -> None:
    """The same once more, enlarged, where the panel is empty."""
    inset = axes.inset_axes((0.14, 0.36, 0.84, 0.54))
    _stack(inset, parts)
    inset.set_ylim(0, pool)
    inset.set_xlabel("")
    inset.set_title("the same, enlarged", fontsize=10, color=INK)
    inset.tick_params(labelsize=9)
