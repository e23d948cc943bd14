"""What the scripts of bench/ share beyond `qkernels.bench.harness`: the checkout's own folders."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(BENCH.parent))

from qkernels.bench.harness import (  # noqa: E402
    ISA_CAPS,
    Worker,
    commit,
    isa_environment,
    machine,
    measure,
    serve,
    write_json,
)
from qkernels.cli import output_file  # noqa: E402

__all__ = [
    "BENCH",
    "ISA_CAPS",
    "Worker",
    "commit",
    "isa_environment",
    "machine",
    "measure",
    "output_file",
    "read_shapes",
    "serve",
    "write_json",
]


def read_shapes(path: Path) -> dict[str, list[int]]:
    """`name int int ...` a line; `#` starts a comment."""
    shapes = {}
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            shapes[words[0]] = [int(word) for word in words[1:]]
    return shapes
