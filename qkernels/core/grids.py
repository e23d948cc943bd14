"""Grids without a model: what calibration or training found, as plain numbers that every front end reads and writes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qkernels.core.attach import OUTPUT, WEIGHT, attached
from qkernels.core.graph import arguments
from qkernels.core.operations import MODULES, WEIGHTED
from qkernels.core.placed import Places, prepare_placed
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported

FORMAT = 1


@dataclass(frozen=True)
class Grid:
    """`x = (code + offset) * scale` for codes from 0 to `codes - 1`; one scale and offset, or one a channel.

    Which integer dtype holds the codes is left open: it does not change the numbers.
    """

    scale: tuple[float, ...]
    offset: tuple[int, ...]
    codes: int
    symmetric: bool = False
    per_channel: bool = False

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(torch.tensor(self.scale, dtype=torch.float32).tolist()))
        object.__setattr__(self, "offset", tuple(self.offset))

    @classmethod
    def of(cls, quantizer: Quantizer) -> "Grid":
        """What a Quantizer rounds to now."""
        grid, spec = quantizer.qparams(), quantizer.spec
        offset = (grid.qmin - grid.zero_point).tolist()
        codes = grid.qmax - grid.qmin + 1
        return cls(grid.scale.tolist(), offset, codes, spec.symmetric, spec.per_channel)

    @property
    def bits(self) -> int:
        return self.codes.bit_length() if self.is_even else (self.codes - 1).bit_length()

    @property
    def is_even(self) -> bool:
        """Whether one code of the bits is left out, as for as many on both sides of zero."""
        return (self.codes + 1).bit_count() == 1

    @property
    def lowest(self) -> int:
        """The first code where codes are even around zero, or unsigned."""
        return 1 - 2 ** (self.bits - 1) if self.is_even else 0

    def ends(self) -> tuple[list[float], list[float]]:
        """The lowest and the highest number of each channel."""
        scale, offset = torch.tensor(self.scale), torch.tensor(self.offset)
        return (offset * scale).tolist(), ((offset + self.codes - 1) * scale).tolist()

    def qparams(self, is_weight: bool, dtype: torch.dtype | None = None) -> QParams:
        """The grid in int8 for a weight and in uint8 for anything else, or in `dtype`."""
        dtype = dtype or (torch.int8 if is_weight else torch.uint8)
        if self.codes > 256:
            raise Unsupported(f"grids: {self.codes} codes are more than 8 bits hold")
        lowest = -(2 ** (self.bits - 1)) + int(self.is_even) if dtype is torch.int8 else 0
        scale, offset = torch.tensor(self.scale), torch.tensor(self.offset, dtype=torch.int32)
        return QParams(scale, lowest - offset, 0 if self.per_channel else None, lowest, lowest + self.codes - 1, dtype)

    def quantizer(self, source: str, is_weight: bool) -> Quantizer:
        """A Quantizer that rounds to this grid."""
        grid = self.qparams(is_weight)
        spec = QSpec(grid.dtype, grid.qmin, grid.qmax, self.symmetric, self.per_channel)
        made = Quantizer(TensorRecipe(spec), source, len(self.scale))
        made.set_qparams(grid)
        return made


# By the path of the module, then "weight", "output" or "input0", ...
Grids = dict[str, dict[str, Grid]]


def grids_of(model: nn.Module) -> Grids:
    """The grids of the Quantizers that `qkernels.core.attach` has put at modules."""
    found: Grids = {}
    for path, key, quantizer in attached(model):
        if quantizer.has_grid():
            found.setdefault(path, {})[key] = Grid.of(quantizer)
    return found


def to_json(grids: Grids) -> str:
    """Keeps every bit: a float32 is exact as a Python float."""
    content = {path: {key: asdict(grid) for key, grid in table.items()} for path, table in grids.items()}
    return json.dumps({"format": FORMAT, "grids": content}, indent=1)


def from_json(text: str) -> Grids:
    content = json.loads(text)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise InvalidArgument(f"grids: format must be {FORMAT}, got {content!r:.80}")
    return {path: {key: Grid(**row) for key, row in table.items()} for path, table in content["grids"].items()}


def prepare_grids(model: nn.Module, example_inputs: Any, grids: Grids) -> nn.Module:
    """`model`, a float model, ready for `convert` with these grids and no others. Uses up `model`.

    Raises:
        InvalidArgument: the model has no such module, or its weight has another number of channels.
    """
    places = Places({}, {}, {}, keep_grids=True)
    modules = dict(model.named_modules())
    for path, table in grids.items():
        if path not in modules:
            raise InvalidArgument(f"grids: the model has no module {path!r}")
        for key, grid in table.items():
            quantizer = grid.quantizer(f"{path}.{key}", key == WEIGHT)
            if key == WEIGHT:
                _check_channels(modules[path], path, grid)
                places.weights[path] = quantizer
            elif key == OUTPUT:
                places.outputs[path] = quantizer
            else:
                row = places.inputs.setdefault(path, [])
                position = int(key.removeprefix("input"))
                row += [None] * (position + 1 - len(row))
                row[position] = quantizer
    return prepare_placed(model, *arguments(example_inputs), places)


def _check_channels(module: nn.Module, path: str, grid: Grid) -> None:
    if MODULES.get(type(module)) not in WEIGHTED:
        raise InvalidArgument(f"grids: {path} is a {type(module).__name__}, whose weight has no grid")
    channels = getattr(module, "out_channels", None) or module.out_features
    if grid.per_channel and len(grid.scale) != channels:
        raise InvalidArgument(f"grids: {path}.weight: {len(grid.scale)} grids for {channels} channels")
