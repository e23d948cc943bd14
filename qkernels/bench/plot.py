"""The picture of a benchmark run."""

import os
from collections.abc import Mapping
from typing import Any

from qkernels.bench.engines import ENGINES
from qkernels.bench.table import title
from qkernels.report.picture import new_figure

_OURS, _PEER, _FLOAT = "#2b6cb0", "#d9a441", "#9aa5b1"


def plot_networks(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]], facts: Mapping[str, Any], path: str | os.PathLike
) -> None:
    """One group of bars a network: milliseconds an image of every engine (the format follows the ending of `path`)."""
    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    figure = new_figure(4.6 * columns, 0.9 + rows * 2.6)
    from matplotlib.patches import Patch

    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (case, row) in zip(grid, results.items(), strict=False):
        bars = [(name, cell["ms_per_image"]) for name, cell in row.items() if "ms_per_image" in cell]
        bars.sort(key=lambda bar: list(ENGINES).index(bar[0]))
        colours = [_OURS if not ENGINES[n].peer else _PEER if ENGINES[n].int8 else _FLOAT for n, _ in bars]
        drawn = axes.barh([ENGINES[n].label for n, _ in bars], [ms for _, ms in bars], color=colours)
        axes.bar_label(drawn, [f" {ms:.2f}" for _, ms in bars], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_title(title(case), fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid):
        axes.set_axis_off()
    kinds = {"qkernels": _OURS, "int8, others": _PEER, "float32": _FLOAT}
    figure.legend(handles=[Patch(color=c, label=k) for k, c in kinds.items()], loc="outside lower center", ncols=3,
                  fontsize=8, frameon=False)  # fmt: skip
    plural = "" if facts["threads"] == 1 else "s"
    figure.suptitle(f"ms an image, {facts['threads']} thread{plural}, {facts['machine']['cpu']}", fontsize=10)
    figure.savefig(path, dpi=120)
