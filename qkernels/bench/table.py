"""The table of a benchmark run."""

from collections.abc import Mapping
from typing import Any

from qkernels.bench.engines import ENGINES


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], facts: Mapping[str, Any]) -> str:
    """Milliseconds an image, one row an engine, one column a network; then ours against the fastest int8 peer."""
    names = [name for name in ENGINES if any(name in row for row in results.values())]
    width = max(16, *(len(title(case)) + 2 for case in results))
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    plural = "" if facts["threads"] == 1 else "s"
    isa = f", {facts['isa']}" if facts.get("isa") else ""
    lines = [
        f"{facts['machine']['cpu']}{isa}, {facts['threads']} thread{plural}; {packages}",
        f"{'ms an image (median)':28s}" + "".join(f"{title(case):>{width}s}" for case in results),
    ]
    for name in names:
        cells = (row.get(name, {}).get("ms_per_image") for row in results.values())
        texts = (f"{'-' if ms is None else f'{ms:.3f}':>{width}s}" for ms in cells)
        lines.append(f"{ENGINES[name].label:28s}" + "".join(texts))
    for ours in (name for name in names if not ENGINES[name].peer):
        ratios = (against_best_int8_peer(row, ours) for row in results.values())
        texts = (f"{'-' if ratio is None else f'{ratio:.2f}':>{width}s}" for ratio in ratios)
        lines.append(f"{ENGINES[ours].label + ' / best int8':28s}" + "".join(texts))
    for case, row in results.items():
        lines += [f"{title(case)}, {ENGINES[n].label}: {cell['error']}" for n, cell in row.items() if "error" in cell]
    return "\n".join(lines)


def title(case: str) -> str:
    model, _, batch = case.rpartition("_b")
    return f"{model} b{batch}"


def against_best_int8_peer(row: Mapping[str, Mapping[str, Any]], ours: str) -> float | None:
    """Our time divided by that of the fastest int8 engine of others; None if one of them is missing."""
    peers = [
        cell["ms_per_image"]
        for name, cell in row.items()
        if ENGINES[name].peer and ENGINES[name].int8 and "ms_per_image" in cell
    ]
    own = row.get(ours, {}).get("ms_per_image")
    return own / min(peers) if own is not None and peers else None
