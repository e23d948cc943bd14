"""Grids without a model: what calibration or training found, as plain numbers that every front end reads and writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qkernels.core.attach import BIAS, OUTPUT, PARAMETERS, WEIGHT, attached
from qkernels.core.graph import arguments
from qkernels.core.operations import MODULES, WEIGHTED, output_channels
from qkernels.core.placed import Places, prepare_placed
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported, close_matches

FORMAT = 1


@dataclass(frozen=True)
class Grid:
    """`x = (code + offset) * scale` for codes from 0 to `codes - 1`, for a tensor, a channel or a block of it.

    Which integer dtype holds the codes is left open: it does not change the numbers. `blocks` is how many blocks there
    are along each dimension of the tensor; scales and offsets are then in row-major order of the blocks.
    """

    scale: tuple[float, ...]
    offset: tuple[int, ...]
    codes: int
    symmetric: bool = False
    per_channel: bool = False
    blocks: tuple[int, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "blocks", None if self.blocks is None else tuple(self.blocks))
        object.__setattr__(self, "scale", tuple(np.asarray(self.scale, dtype=np.float32).tolist()))
        object.__setattr__(self, "offset", tuple(self.offset))

    @classmethod
    def of(cls, quantizer: Quantizer) -> "Grid":
        """What a Quantizer rounds to now."""
        grid, spec = quantizer.qparams(), quantizer.spec
        offset = (grid.qmin - grid.zero_point).tolist()
        codes = grid.qmax - grid.qmin + 1
        return cls(grid.scale.tolist(), offset, codes, spec.symmetric, spec.per_channel, quantizer.blocks)

    def repeated(self, times: int) -> "Grid":
        """The channels `times` times, one after the other."""
        return replace(self, scale=self.scale * times, offset=self.offset * times)

    def checked(self, where: str) -> "Grid":
        """Itself, if its numbers are those of a grid; `where` is what messages begin with."""
        if len(self.scale) != len(self.offset):
            raise InvalidArgument(f"{where}: {len(self.scale)} scales and {len(self.offset)} offsets or zero points")
        for scale, offset in zip(self.scale, self.offset, strict=True):
            if not torch.finfo(torch.float32).tiny <= scale <= torch.finfo(torch.float32).max:
                raise InvalidArgument(f"{where}: scale must be positive, finite and normal, got {scale!r}")
            if not 1 - self.codes <= offset <= 0:
                raise InvalidArgument(f"{where}: zero must be one of the {self.codes} codes, got code {-offset}")
        return self

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
        scale, offset = self._tensors()
        return (offset * scale).tolist(), ((offset + self.codes - 1) * scale).tolist()

    def _tensors(self) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(self.scale, dtype=torch.float32, device="cpu")
        return scale, torch.tensor(self.offset, dtype=torch.int32, device="cpu")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of scale and offset, where blocks keep all dimensions of the tensor."""
        return self.blocks or ((len(self.scale),) if self.per_channel else ())

    def check_no_blocks(self, form: str) -> None:
        """For forms that have no grids for blocks."""
        if self.blocks is not None:
            raise Unsupported(f"{form}: no form for a grid for each of {list(self.blocks)} blocks; use to_json")

    def qparams(self, is_weight: bool, spec: QSpec | None = None) -> QParams:
        """The grid with signed codes for a weight and unsigned ones for anything else, or as `spec` has them."""
        lowest = -(2 ** (self.bits - 1)) + int(self.is_even) if is_weight else 0
        dtype, block = torch.int8 if is_weight else torch.uint8, None
        if self.bits > 8:
            dtype = torch.int32
        if spec is not None:
            lowest, dtype, block = spec.qmin, spec.dtype, spec.block
        scale, offset = self._tensors()
        axis, highest = 0 if self.per_channel else None, lowest + self.codes - 1
        return QParams(scale, lowest - offset, axis, lowest, highest, dtype, block)

    def quantizer(self, source: str, is_weight: bool, shape: Sequence[int] | None = None) -> Quantizer:
        """A Quantizer that rounds to this grid; where it is one for blocks, those of a tensor of `shape`."""
        grid, block = self.qparams(is_weight), None
        if self.blocks is not None:
            if shape is None or len(shape) != len(self.blocks):
                raise Unsupported(f"grids: {source}: a grid for each of {list(self.blocks)} blocks of an unknown shape")
            block = tuple(-1 if count == 1 else n // count for n, count in zip(shape, self.blocks, strict=True))
            grid = replace(grid, block=block)
        spec = QSpec(grid.dtype, grid.qmin, grid.qmax, self.symmetric, self.per_channel, block=block)
        made = Quantizer(TensorRecipe(spec), source, len(self.scale))
        made.set_qparams(grid)
        return made


# By the path of the module, then "weight", "bias", "output" or "input0", ...
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
    tables = content["grids"].items()
    return {path: {key: Grid(**row).checked(f"{path}.{key}") for key, row in t.items()} for path, t in tables}


def prepare_grids(model: nn.Module, example_inputs: Any, grids: Grids) -> nn.Module:
    """`model`, a float model, ready for `convert` with these grids and no others. Uses up `model`.

    Raises:
        InvalidArgument: the model has no such module, or its weight has another number of channels.
    """
    places = Places({}, {}, {}, keep_grids=True)
    modules = dict(model.named_modules())
    for path, table in grids.items():
        if path not in modules:
            raise InvalidArgument(f"grids: the model has no module {path!r}{close_matches(path, modules)}")
        for key, grid in table.items():
            parameter = modules[path]._parameters.get(key)
            shape = None if parameter is None else parameter.shape
            quantizer = grid.quantizer(f"{path}.{key}", key in PARAMETERS, shape)
            if key == WEIGHT:
                _check_channels(modules[path], path, grid)
                places.weights[path] = quantizer
            elif key == BIAS:
                _round_bias(modules[path], path, quantizer)
            elif key == OUTPUT:
                places.outputs[path] = quantizer
            else:
                row = places.inputs.setdefault(path, [])
                position = int(key.removeprefix("input"))
                row += [None] * (position + 1 - len(row))
                row[position] = quantizer
    return prepare_placed(model, *arguments(example_inputs), places)


def _round_bias(module: nn.Module, path: str, quantizer: Quantizer) -> None:
    """Integer layers add the rounded numbers."""
    if module._parameters.get(BIAS) is None:
        raise InvalidArgument(f"grids: {path} has no bias")
    quantizer.state = State.FROZEN
    with torch.no_grad():
        module.bias = nn.Parameter(quantizer(module.bias))


def _check_channels(module: nn.Module, path: str, grid: Grid) -> None:
    if MODULES.get(type(module)) not in WEIGHTED:
        raise InvalidArgument(f"grids: {path} is a {type(module).__name__}, whose weight has no grid")
    channels = output_channels(module)
    if grid.per_channel and grid.blocks is None and len(grid.scale) != channels:
        raise InvalidArgument(f"grids: {path}.weight: {len(grid.scale)} grids for {channels} channels")
