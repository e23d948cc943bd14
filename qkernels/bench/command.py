"""`python -m qkernels bench`: chooses engines, drives their workers, prints the table, writes JSON and the picture."""

import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import qkernels
from qkernels.bench.engines import ENGINES, PEERS
from qkernels.bench.harness import Worker, isa_environment, machine, measure, write_json
from qkernels.bench.networks import constructor
from qkernels.bench.table import table
from qkernels.errors import InvalidArgument

WORKER = ("-m", "qkernels.bench.worker")
_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino")


def run(
    models: Sequence[str],
    batches: Sequence[int],
    size: int,
    peers: Sequence[str],
    threads: int,
    rounds: int,
    isa: str = "",
    json_path: str | None = None,
    plot_path: str | None = None,
) -> int:
    """Measures and reports; the exit status is 1 if an engine of ours failed."""
    for model in models:
        constructor(model)
    engines = _chosen(peers, isa)
    environment = isa_environment(isa)
    workers = [Worker(WORKER, name, threads, environment) for name in engines]
    results: dict[str, dict[str, Any]] = {}
    try:
        for model in models:
            for batch in batches:
                print(f"{model}, batch {batch} ...", file=sys.stderr, flush=True)
                row = measure(workers, {"model": model, "batch": batch, "size": size}, rounds)
                for cell in row.values():
                    if "median_us" in cell:
                        cell["ms_per_image"] = cell["median_us"] / 1e3 / batch
                results[f"{model}_b{batch}"] = row
    finally:
        for worker in workers:
            worker.close()
    facts = {"machine": machine(), "threads": threads, "rounds": rounds, "size": size, "isa": isa}
    facts |= {"environment": environment, "packages": versions()}
    if json_path:
        write_json(Path(json_path), {**facts, "results": results})
    _show(results, facts, plot_path)
    return int(any("error" in row[name] for row in results.values() for name in row if not ENGINES[name].peer))


def show(json_path: str, plot_path: str | None = None) -> int:
    """Prints and draws a run that was written before, on this machine or another."""
    try:
        saved = json.loads(Path(json_path).read_text())
        results, facts = saved["results"], {key: saved[key] for key in ("machine", "threads", "packages")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"bench: {json_path} is not what `bench --json` writes: {error!r}") from error
    _show(results, {**facts, "isa": saved.get("isa", "")}, plot_path)
    return 0


def _show(results: dict[str, Any], facts: dict[str, Any], plot_path: str | None) -> None:
    print(table(results, facts))
    if plot_path:
        from qkernels.bench.plot import plot_networks

        plot_networks(results, facts, plot_path)


def _chosen(peers: Sequence[str], isa: str) -> list[str]:
    """The engines to run: ours, and those of the peers whose packages are here. Says which are left out."""
    if unknown := sorted(set(peers) - set(PEERS)):
        raise InvalidArgument(f"bench: unknown peers {unknown}; there are {list(PEERS)}")
    chosen = []
    for name, engine in ENGINES.items():
        if engine.peer and engine.peer not in peers:
            continue
        if isa and engine.peer == "ort":
            print(f"{engine.label}: left out, as nothing limits it to {isa}", file=sys.stderr)
        elif missing := engine.missing():
            print(f"{engine.label}: left out, as {', '.join(missing)} is not installed", file=sys.stderr)
        else:
            chosen.append(name)
    return chosen


def versions() -> dict[str, str]:
    """What is installed of the packages that the engines use."""
    found = {"qkernels": qkernels.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
