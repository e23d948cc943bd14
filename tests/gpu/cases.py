"""The cases of `make gpu-check`, by part: what runs on the GPU, compared with the CPU bit for bit, or timed.

`cases_of(part, small)` yields (name, function); the function raises where something is wrong, and may return what is
worth keeping, as JSON takes it. Each part is a generator of that kind in a file of its own or of its kin.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import stand_ins  # noqa: F401  (before qkernels)

Cases = Iterator[tuple[str, Callable[[], Any]]]

_PLACES = {
    **{part: f"weighted_cases.{part}" for part in ("linear", "conv", "rows", "wgmma")},
    **{"floats": "op_cases.floats", "ops": "op_cases.samples", "errors": "op_cases.errors"},
    **{
        "large": "large_cases.large",
        "opcheck": "op_cases.opcheck",
        "model": "model_cases.model",
        "training": "training_cases.training",
    },
    **{"graph": "graph_cases.graph", "streams": "stream_cases.streams", "bench": "bench_cases.bench"},
}


def cases_of(part: str, small: bool) -> Cases:
    module, _, name = _PLACES[part].partition(".")
    return getattr(importlib.import_module(module), name)(small)
