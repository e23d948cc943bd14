"""Scales and zero points of observers, as torch's quantization functions and FixedQParamsObserver take them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qkernels.core.attach import OUTPUT, WEIGHT
from qkernels.core.grids import Grid, Grids
from qkernels.core.layers import Prepared
from qkernels.core.quantizer import Quantizer
from qkernels.errors import InvalidArgument
from qkernels.frontends.common import check_one_of
from qkernels.frontends.torch_ao.observers import QSCHEMES
from qkernels.frontends.torch_ao.parse import observed_copy, places_of

TORCH_DTYPES = {torch.uint8: torch.quint8, torch.int8: torch.qint8, torch.int32: torch.qint32}


def of_model(model: nn.Module) -> Grids:
    """The grids of a calibrated or trained model, prepared here or by torch.ao itself, where data passed."""
    work = observed_copy(model)
    places = places_of(work)
    found: Grids = {
        path: {OUTPUT: Grid.of(quantizer)} for path, quantizer in places.outputs.items() if quantizer.has_grid()
    }
    for path, module in work.named_modules():
        if isinstance(module, Quantizer) and module.has_grid() and path.rpartition(".")[2] != WEIGHT:
            found[path.removesuffix(".activation_post_process")] = {OUTPUT: Grid.of(module)}
    weights = {path: module.quantizers[WEIGHT] for path, module in work.named_modules() if isinstance(module, Prepared)}
    layers = dict(model.named_modules())
    for path, quantizer in (places.weights | weights).items():
        # torch's trained layers hold their clamp themselves
        holder = path if path in layers else path.removesuffix(".0")
        found.setdefault(holder, {})[WEIGHT] = Grid.of(quantizer)
    return found


def write(grids: Grids) -> dict[str, dict[str, dict[str, Any]]]:
    """scale, zero_point, dtype, qscheme, quant_min and quant_max by module and "weight", "output" or "input0"."""
    return {path: {key: _options(grid, key == WEIGHT) for key, grid in table.items()} for path, table in grids.items()}


def _options(grid: Grid, is_weight: bool) -> dict[str, Any]:
    grid.check_no_blocks("qparams")
    made = grid.qparams(is_weight)
    qscheme = next(scheme for scheme, kind in QSCHEMES.items() if kind == (grid.symmetric, grid.per_channel))
    return {
        **{"scale": made.scale, "zero_point": made.zero_point, "dtype": TORCH_DTYPES[made.dtype], "qscheme": qscheme},
        **{"quant_min": made.qmin, "quant_max": made.qmax},
    }


def read(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Grids:
    """The opposite of `write`, for any of torch's dtypes."""
    return {p: {key: _grid(options, f"{p}.{key}") for key, options in row.items()} for p, row in table.items()}


def _grid(options: Mapping[str, Any], where: str) -> Grid:
    for name in ("scale", "zero_point", "quant_min", "quant_max", "qscheme"):
        if name not in options:
            raise InvalidArgument(f"{where}.{name}: missing; there are {list(options)}")
    check_one_of(options["qscheme"], tuple(QSCHEMES), f"{where}.qscheme")
    scale, zero_point = (torch.as_tensor(options[name]).reshape(-1) for name in ("scale", "zero_point"))
    low, high = options["quant_min"], options["quant_max"]
    found = Grid(scale.tolist(), (low - zero_point.int()).tolist(), high - low + 1, *QSCHEMES[options["qscheme"]])
    return found.checked(where)
