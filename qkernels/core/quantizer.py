"""The one module that watches or rounds a tensor, in one of four explicit states."""

import enum

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.observers import make_observer
from qkernels.core.qspec import QParams
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidState, InvalidType


class State(enum.IntEnum):
    """What a Quantizer does in forward."""

    OFF = 0  # nothing
    OBSERVE = 1  # watch, pass on unchanged
    FAKE_QUANT = 2  # round to the grid and back
    FROZEN = 3  # the same, and calibration leaves the grid alone


class Quantizer(nn.Module):
    """A place in the network where a tensor gets onto an integer grid.

    Args:
        recipe: the kind of grid and the observer that chooses it.
        source: the path of the module whose output (or weight) passes here; for messages.
        channels: the number of channels if the grid is per channel.

    State and grid are part of the state_dict. The tensor stays float32 all the time: in FAKE_QUANT it holds the values
    that the integers of the converted model stand for.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, recipe: TensorRecipe, source: str = "", channels: int | None = None):
        super().__init__()
        self.recipe = recipe
        self.source = source
        self.observer = make_observer(recipe.observer, recipe.spec, channels, **dict(recipe.options))
        self.observer.source = source or "a tensor"
        self.state = State.OFF
        size = self.observer.low.numel()
        # An empty grid is told from a chosen one by its scale: 0 is never a valid scale.
        self.register_buffer("scale", torch.zeros(size))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32))

    @property
    def spec(self):
        return self.recipe.spec

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.per_channel else None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is State.OFF:
            return x
        if self.state is State.OBSERVE:
            self.observer.observe(x)
            return x
        if x.dtype != torch.float32:
            raise InvalidType(f"the quantizer of {self.source} takes float32, got {x.dtype}")
        spec = self.spec
        return ops.fake_quant(x, self.scale, self.zero_point, self.axis, spec.qmin, spec.qmax)

    def has_grid(self) -> bool:
        return bool((self.scale > 0).all())

    def qparams(self) -> QParams:
        """The chosen grid."""
        if not self.has_grid():
            raise InvalidState(f"{self.source} has no grid yet; run batches inside `with qkernels.calibrating(model):`")
        spec = self.spec
        return QParams(self.scale.clone(), self.zero_point.clone(), self.axis, spec.qmin, spec.qmax, spec.dtype)

    def set_qparams(self, grid: QParams) -> None:
        """Takes the grid `grid`; the state stays."""
        if (grid.qmin, grid.qmax, grid.dtype, grid.axis) != (
            self.spec.qmin,
            self.spec.qmax,
            self.spec.dtype,
            self.axis,
        ):
            raise InvalidState(f"{self.source}: {grid} is not a grid of kind {self.spec}")
        self.scale.copy_(grid.scale)
        self.zero_point.copy_(grid.zero_point)

    def choose(self) -> None:
        """Takes the grid that the observer proposes."""
        self.set_qparams(self.observer.qparams())

    def get_extra_state(self) -> Tensor:
        return torch.tensor(int(self.state), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.state = State(int(state))

    def extra_repr(self) -> str:
        return f"{self.source}, {self.state.name}, {self.spec.dtype}, observer={self.recipe.observer}"
