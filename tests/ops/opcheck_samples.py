"""Arguments with which torch.library.opcheck runs each op: name -> functions that make one tuple of arguments each.

tests/architecture/test_op_table.py runs them and fails for an op of the schema without a sample.
"""

from collections.abc import Callable

import torch

SAMPLES: dict[str, list[Callable[[], tuple]]] = {}


def grid(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((channels,), 0.05), torch.zeros(channels, dtype=torch.int32)


# ---- fake_quant ----

SAMPLES["fake_quant"] = [
    lambda: (torch.randn(3, 5), *grid(), None, -128, 127),
    lambda: (torch.randn(2, 4, 3), *grid(4), 1, 0, 255),
    lambda: (torch.randn(0), *grid(), None, 0, 255),
]
SAMPLES["fake_quant_out"] = [
    lambda: (torch.randn(3, 5), *grid(), None, -128, 127, torch.empty(3, 5)),
]
