"""The one module that watches or rounds a tensor, in one of four explicit states."""

import enum

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.observers import make_observer
from qkernels.core.qspec import QParams, grid_values
from qkernels.core.recipe import TensorRecipe
from qkernels.core.rules import make_rule
from qkernels.errors import InvalidState, InvalidType


class State(enum.IntEnum):
    """What a Quantizer does in forward."""

    OFF = 0  # nothing
    OBSERVE = 1  # watch, pass on unchanged
    FAKE_QUANT = 2  # round to the grid and back
    FROZEN = 3  # the same, and calibration leaves the grid alone
    TRAIN = 4  # in training mode watch (or learn) and round; in eval mode round


ROUNDING = frozenset({State.FAKE_QUANT, State.FROZEN, State.TRAIN})


class Quantizer(nn.Module):
    """A place in the network where a tensor gets onto an integer grid.

    Args:
        recipe: the kind of grid, the observer that chooses it, and the rule that trains it.
        source: the path of the module whose output (or weight) passes here; for messages.
        channels: the number of channels if the grid is per channel.
        trained: whether it takes part in training, by the rule of the recipe.
        is_weight: a weight is seen anew at every training step; an activation adds to what was seen.

    State and grid are part of the state_dict. The tensor stays floating-point all the time: on the grid it holds the
    values that the integers of the converted model stand for.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        recipe: TensorRecipe,
        source: str = "",
        channels: int | None = None,
        trained: bool = False,
        is_weight: bool = False,
    ):
        super().__init__()
        self.recipe = recipe
        self.source = source
        self.is_weight = is_weight
        self.observer = make_observer(recipe.observer, recipe.spec, channels, **dict(recipe.options))
        self.observer.source = source or "a tensor"
        self.rule = make_rule(recipe.rule, recipe.spec, channels, **dict(recipe.rule_options)) if trained else None
        self.state = State.OFF
        self.delay = 0  # training steps that TRAIN still only watches
        size = self.observer.low.numel()
        # An empty grid is told from a chosen one by its scale: 0 is never a valid scale.
        self.register_buffer("scale", torch.zeros(size))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32))
        self._chosen = False

    @property
    def spec(self):
        return self.recipe.spec

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.per_channel else None

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        if state is State.OFF:
            return x
        if state is State.OBSERVE:
            self.observer.observe(x)
            return x
        if state is State.TRAIN and self.training:
            grid = self._train_on(x)
            if self.delay > 0:
                self.delay -= 1
                return x
            if grid is not None:
                return self.rule(x, *grid)
        return self.on_grid(x)

    def on_grid(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid of now."""
        if self.rule is None and x.dtype != torch.float32:
            raise InvalidType(f"the quantizer of {self.source} takes float32, got {x.dtype}")
        if not self._chosen:
            if x.numel() == 0:
                return x
            raise InvalidState(
                f"the quantizer of {self.source} has no grid yet: run a training batch, or batches inside `calibrating`"
            )
        if self.rule is not None:
            return self.rule(x, *self.rule.grid(self.scale, self.zero_point))
        spec = self.spec
        return ops.fake_quant(x, self.scale, self.zero_point, self.axis, spec.qmin, spec.qmax)

    def _train_on(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Lets the grid follow `x`, or start from it; None where `x` says nothing about it.

        The result is not the buffers: those change again before the backward if this is called twice.
        """
        if x.numel() == 0 or (self._chosen and not self.rule.observes):
            return None
        if self.is_weight:
            self.observer.reset()
        self.observer.observe(x)
        scale, zero_point = grid_values(self.spec, *self.observer.range())
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._take_over(x)
        return self.rule.grid(scale, zero_point) if self.rule.observes else None

    def _take_over(self, x: Tensor | None = None) -> None:
        if not self._chosen and self.rule is not None:
            self.rule.start(x, self.scale, self.zero_point)
        self._chosen = True

    def has_grid(self) -> bool:
        return bool((self.scale > 0).all())

    def qparams(self) -> QParams:
        """The chosen grid."""
        if not self.has_grid():
            raise InvalidState(f"{self.source} has no grid yet; run batches inside `with qkernels.calibrating(model):`")
        spec, scale, zero_point = self.spec, self.scale, self.zero_point
        if self.rule is not None:
            scale, zero_point = self.rule.grid(scale, zero_point)
            if zero_point.is_floating_point():
                zero_point = torch.round(zero_point.detach()).clamp(spec.qmin, spec.qmax)
        return QParams(scale.clone(), zero_point.clone(), self.axis, spec.qmin, spec.qmax, spec.dtype)

    def set_qparams(self, grid: QParams) -> None:
        """Takes the grid `grid`; the state stays."""
        if (grid.qmin, grid.qmax, grid.dtype, grid.axis) != (
            self.spec.qmin,
            self.spec.qmax,
            self.spec.dtype,
            self.axis,
        ):
            raise InvalidState(f"{self.source}: {grid} is not a grid of kind {self.spec}")
        with torch.no_grad():
            self.scale.copy_(grid.scale)
            self.zero_point.copy_(grid.zero_point)
        self._chosen = False
        self._take_over()

    def choose(self) -> None:
        """Takes the grid that the observer proposes."""
        self.set_qparams(self.observer.qparams())

    def get_extra_state(self) -> Tensor:
        return torch.tensor([int(self.state), self.delay])

    def set_extra_state(self, state: Tensor) -> None:
        self.state, self.delay = State(int(state[0])), int(state[1])

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._chosen = self.has_grid()

    def extra_repr(self) -> str:
        return f"{self.source}, {self.state.name}, {self.spec.dtype}, observer={self.recipe.observer}"
