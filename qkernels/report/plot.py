"""Pictures of a comparison."""

import math
import os
from typing import TYPE_CHECKING, Any

from qkernels.report.comparison import Comparison
from qkernels.report.picture import check_picture, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#9aa5b1", "#d9a441", "#2b6cb0")


def _figure(width: float, height: float, columns: int = 1, ratios: tuple[float, ...] = (1,)) -> Any:
    figure = new_figure(width, height)
    return figure, figure.subplots(1, columns, width_ratios=ratios, squeeze=False)[0]


def plot_comparison(comparison: Comparison, path: str | os.PathLike) -> None:
    """Writes the signal-to-noise ratio of every layer as a bar chart (the format follows the ending of `path`)."""
    check_picture(path)
    figure, (axes,) = _figure(7, 1.2 + 0.22 * len(comparison.layers))
    _draw_sqnr(axes, comparison)
    figure.savefig(path, dpi=120)


def plot_demo(rows: list[dict[str, Any]], comparison: Comparison, title: str, path: str | os.PathLike) -> None:
    """Writes the demo's picture: layers' noise, accuracy, and latency at each batch size."""
    batches = list(rows[0]["latency_ms"])
    figure, axes = _figure(5 + 3 * (1 + len(batches)), 1.2 + max(4.0, 0.25 * len(comparison.layers)), 2 + len(batches),
                           (1.8, *(1,) * (1 + len(batches))))  # fmt: skip
    _draw_sqnr(axes[0], comparison)
    names = [row["engine"] for row in rows]
    _draw_bars(axes[1], names, [100 * row["accuracy"] for row in rows], "accuracy, %", "{:.2f}")
    for axis, batch in zip(axes[2:], batches, strict=True):
        _draw_bars(axis, names, [row["latency_ms"][batch] for row in rows], f"latency at batch {batch}, ms", "{:.3f}")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw_sqnr(axes: "Axes", comparison: Comparison) -> None:
    finite = [layer.sqnr_db for layer in comparison.layers if math.isfinite(layer.sqnr_db)]
    top = max(finite, default=1.0)
    values = [min(layer.sqnr_db, top) for layer in comparison.layers]
    axes.barh(range(len(values)), values, color=_COLOURS[2])
    axes.set_yticks(range(len(values)), [layer.name for layer in comparison.layers], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"SQNR of each layer, dB (output: {comparison.output_sqnr_db:.1f})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: "Axes", names: list[str], values: list[float], title: str, form: str) -> None:
    bars = axes.bar(range(len(values)), values, color=[_COLOURS[i % len(_COLOURS)] for i in range(len(values))])
    axes.bar_label(bars, [form.format(v) for v in values], fontsize=8)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
