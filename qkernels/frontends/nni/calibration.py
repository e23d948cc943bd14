"""NNI's calibration config without a quantizer: to grids, and from them."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qkernels.core.attach import OUTPUT, WEIGHT
from qkernels.core.grids import Grid, Grids
from qkernels.errors import InvalidArgument


def read(calibration_config: Mapping[str, Mapping[str, Mapping[str, Any]]], model: nn.Module | None = None) -> Grids:
    """The grids of a calibration config. `model` tells blocks of rows from rows, whose scales look alike.

    Targets whose scale is None, where no tensor has passed, have none.
    """
    found: Grids = {}
    for path, targets in calibration_config.items():
        for target, entry in targets.items():
            where = f"calibration_config.{path}.{target}"
            dtype = re.fullmatch(r"(u?)int(\d+)", str(entry.get("quant_dtype")))
            slot = re.fullmatch(r"(weight|bias)|_output_0|_input_(\d+)", target)
            if dtype is None or slot is None:
                raise InvalidArgument(f"{where}: must be weight, bias, _input_N or _output_0, of dtype intN or uintN")
            for needed in ("scale", "zero_point", "quant_scheme"):
                if needed not in entry:
                    raise InvalidArgument(f"{where}.{needed}: missing; there are {list(entry)}")
            if entry["scale"] is None:
                continue
            bits, scale = int(dtype[2]), torch.as_tensor(entry["scale"])
            lowest = 0 if dtype[1] else 1 - 2 ** (bits - 1)
            offset = (lowest - torch.as_tensor(entry["zero_point"]).float()).round().int()
            key = slot[1] or (f"input{slot[2]}" if slot[2] else OUTPUT)
            codes, symmetric = 2**bits - (not dtype[1]), entry["quant_scheme"] != "affine"
            parameter = None if model is None else model.get_submodule(path)._parameters.get(key)
            rows = scale.numel() if parameter is None else len(parameter)
            blocks = (
                tuple(scale.shape) if scale.numel() > 1 and (scale.numel(), *scale.shape[:1]) != (rows, rows) else None
            )
            how = codes, symmetric, scale.numel() > 1, blocks
            grid = Grid(scale.reshape(-1).tolist(), offset.reshape(-1).tolist(), *how)
            found.setdefault(path, {})[key] = grid.checked(where)
    return found


def target(key: str) -> str:
    """NNI's name for the tensor "weight", "output" or "input0", ... of a module."""
    return "_output_0" if key == OUTPUT else key.replace("input", "_input_")


def write(grids: Grids, model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """The calibration config of grids; `model` knows the shapes of weights. The tracked range is that of the grid."""
    config: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for path, table in grids.items():
        for key, grid in table.items():
            shape = grid.shape
            if len(shape) == 1 and key == WEIGHT:
                shape = (-1, *[1] * (model.get_submodule(path).weight.dim() - 1))
            low, high = (torch.tensor(end).reshape(shape) for end in grid.ends())
            config[path][target(key)] = {
                "scale": torch.tensor(grid.scale).reshape(shape),
                "zero_point": (grid.lowest - torch.tensor(grid.offset)).float().reshape(shape),
                "quant_dtype": f"{'int' if grid.is_even else 'uint'}{grid.bits}",
                "quant_scheme": "symmetric" if grid.symmetric else "affine",
                "quant_bits": grid.bits,
                "tracked_max": high,
                "tracked_min": low,
            }
    return config


def without_grid(bits: int, signed: bool, scheme: str) -> dict[str, Any]:
    """The entry of a tensor that has not passed yet."""
    dtype = f"{'int' if signed else 'uint'}{bits}"
    return {"scale": None, "zero_point": None, "quant_dtype": dtype, "quant_scheme": scheme, "quant_bits": bits}
