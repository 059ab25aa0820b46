"""A roofline (Williams, Waterman and Patterson, 2009): work per byte against work per second, under two ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw(
    path: Path, title: str, bandwidth: float, peak: float, points: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draw ``points`` of (flop/byte, flop/s) by series, under ``bandwidth`` in bytes/s and ``peak`` in flop/s."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [x for series in points.values() for x, _ in series]
    low, high = min(intensities) / 2, max(*intensities, peak / bandwidth) * 2
    knee = peak / bandwidth
    axes.plot([low, knee, high], [low * bandwidth / 1e9, peak / 1e9, peak / 1e9], color="0.4", label="ceiling")
    for name, series in points.items():
        axes.scatter([x for x, _ in series], [y / 1e9 for _, y in series], s=18, label=name)
    axes.set(xscale="log", yscale="log", xlabel="flop / byte of K and V", ylabel="GFLOP/s", title=title)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
