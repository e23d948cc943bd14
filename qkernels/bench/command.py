"""`python -m qkernels bench`: chooses engines, drives their workers, prints the table, writes JSON and the picture."""

import json
import os
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
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.report.picture import check_picture
from qkernels.testing import supported_isas

WORKER = ("-m", "qkernels.bench.worker")
Results = dict[str, dict[str, Any]]
_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino")


def run(
    models: Sequence[str],
    batches: Sequence[int],
    size: int,
    peers: Sequence[str],
    threads: int,
    rounds: int,
    isa: str = "",
    json_path: str | os.PathLike | None = None,
    plot_path: str | os.PathLike | None = None,
) -> int:
    """Measures and reports; the exit status is 1 if an engine of ours failed.

    Whatever ends it early, Ctrl-C for example: the networks that were measured by then are reported.
    """
    for model in models:
        constructor(model)
    if isa and isa not in supported_isas():
        raise Unsupported(f"bench: isa must be one that this machine has, {supported_isas()[1:]}, got {isa!r}")
    if plot_path:
        check_picture(plot_path)
    engines = _chosen(peers, isa)
    environment = isa_environment(isa)
    facts = {"machine": machine(), "threads": threads, "rounds": rounds, "size": size, "isa": isa}
    facts |= {"environment": environment, "packages": versions()}
    workers = [Worker(WORKER, name, threads, environment) for name in engines]
    results: Results = {}
    try:
        for model in models:
            for batch in batches:
                print(f"{model}, batch {batch} ...", file=sys.stderr, flush=True)
                row = measure(workers, {"model": model, "batch": batch, "size": size}, rounds)
                for cell in row.values():
                    if "median_us" in cell:
                        cell["ms_per_image"] = cell["median_us"] / 1e3 / batch
                results[f"{model}_b{batch}"] = row
    except KeyboardInterrupt:
        for worker in workers:
            worker.interrupt()
        raise
    finally:
        for worker in workers:
            worker.close()
        if results:
            _report(results, facts, json_path, plot_path)
    return int(any("error" in row[name] for row in results.values() for name in row if not ENGINES[name].peer))


def show(json_path: str | os.PathLike, plot_path: str | os.PathLike | None = None) -> int:
    """Prints and draws a run that was written before, on this machine or another."""
    try:
        saved = json.loads(Path(json_path).read_text())
        results = {case: {name: dict(cell) for name, cell in row.items()} for case, row in saved["results"].items()}
        facts = {"machine": {"cpu": saved["machine"]["cpu"]}, "threads": saved["threads"]}
        facts |= {"packages": dict(saved["packages"]), "isa": saved.get("isa", "")}
        if unknown := {name for row in results.values() for name in row} - set(ENGINES):
            raise ValueError(f"there are no engines {sorted(unknown)}")
        if not results:
            raise ValueError("it has no results")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"bench: {json_path} is not what `bench --json` writes: {error!r}") from error
    if plot_path:
        check_picture(plot_path)
    _report(results, facts, None, plot_path)
    return 0


def _report(
    results: Results, facts: dict[str, Any], json_path: str | os.PathLike | None, plot_path: str | os.PathLike | None
) -> None:
    """Prints first; neither a reader that has left nor a file that cannot be written takes the other away."""
    try:
        print(table(results, facts), flush=True)
    finally:
        if json_path:
            write_json(Path(json_path), {**facts, "results": results})
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
