"""The one module that watches or rounds a tensor, in one of four explicit states."""

import enum
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.blocks import counts, from_rows, to_rows
from qkernels.core.norm import Norm
from qkernels.core.observers import is_distributed, make_observer, mean_over_ranks
from qkernels.core.qspec import QParams, choose_qparams, grid_values
from qkernels.core.recipe import TensorRecipe
from qkernels.core.rules import make_rule
from qkernels.core.rules.lsq import LearnedStep
from qkernels.errors import InvalidArgument, InvalidState, InvalidType

Limits = tuple[float, float] | None


class State(enum.IntEnum):
    """What a Quantizer does in forward."""

    OFF = 0  # nothing
    OBSERVE = 1  # watch, pass on unchanged
    FAKE_QUANT = 2  # round to the grid and back
    FROZEN = 3  # the same, and calibration leaves the grid alone
    TRAIN = 4  # in training mode watch (or learn) and round; in eval mode round
    FROZEN_OFF = 5  # pass on unchanged, and calibration leaves the grid alone


ROUNDING = frozenset({State.FAKE_QUANT, State.FROZEN, State.TRAIN})


class Quantizer(nn.Module):
    """A place in the network where a tensor gets onto an integer grid.

    Args:
        recipe: the kind of grid, the observer that chooses it, and the rule that trains it.
        source: the path of the module whose output (or weight) passes here; for messages.
        channels: the number of channels if the grid is per channel; of a grid for each block of an activation the
            first tensor says it.
        trained: whether it takes part in training, by the rule of the recipe.
        is_weight: a weight is seen anew at every training step, unless the recipe asks for a moving average; an
            activation adds to what was seen.

    State and grid are part of the state_dict. The tensor stays floating-point all the time: on the grid it holds the
    values that the integers of the converted model stand for.
    """

    scale: Tensor
    zero_point: Tensor
    traced_as_leaf = True

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
        self.forgets = is_weight and recipe.observer != "moving_average"
        self.trained = trained
        self.state = State.OFF
        self.delay = 0  # training steps that TRAIN still only watches
        self.counts = True  # whether each batch is a step; otherwise somebody else takes steps off the delay
        self.gives_codes = False  # whether a layer that runs on integers reads the output
        self.joins = False  # whether several tensors of one forward pass here, which share the grid
        self._waits = False  # whether the tensor of now belongs to a training step of the delay
        self._ready: tuple[weakref.ref, Tensor] | None = None  # the last output and its codes, until they are asked for
        self._done: weakref.ref | None = None  # what `normalized` gave, until it arrives
        self._counts: tuple[int, ...] | None = None
        self._sized = channels is not None or recipe.spec.block is None
        self._make(channels if self._sized else 1)
        self._chosen = False
        # The op does what these two do together, in one pass.
        plain = recipe.observer in ("minmax", "moving_average") and not recipe.spec.uneven
        self._fused = trained and recipe.rule == "ste" and plain

    def _make(self, channels: int | None) -> None:
        """Observer, rule and an empty grid."""
        recipe = self.recipe
        self.observer = make_observer(recipe.observer, recipe.spec, channels, **dict(recipe.options))
        self.observer.source = self.source or "a tensor"
        if recipe.non_finite == "ignore":
            self.observer.ignore_non_finite()
        self.rule = None
        if self.trained:
            self.rule = make_rule(recipe.rule, recipe.spec, channels, self.is_weight, **dict(recipe.rule_options))
        size = self.observer.low.numel()
        # An empty grid is told from a chosen one by its scale: 0 is never a valid scale.
        self.register_buffer("scale", torch.zeros(size, dtype=torch.float32, device="cpu"))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32, device="cpu"))

    @property
    def spec(self):
        return self.recipe.spec

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.per_channel else None

    def forward(self, x: Tensor, exact: Tensor | None = None, clamp: Limits = None, joined: bool = False) -> Tensor:
        """`x` as the state says.

        Args:
            x: a floating-point tensor.
            exact: what the integers give for it, to be returned with the gradient of rounding.
            clamp: `x` is limited to these two numbers first.
            joined: `x` and the tensor before are watched as one.
        """
        if self._done is not None:
            done, self._done = self._done(), None
            if x is done:
                return x
        if exact is not None:
            self._waits = False
            return Substitute.apply(self.on_grid(x, clamp), exact) if torch.is_grad_enabled() else exact
        self._begin(joined)
        block = self.spec.block
        if block is None or x.numel() == 0:
            return self._as_state_says(x, clamp, joined)
        return from_rows(self._as_state_says(self._rows(x), clamp, joined), x.shape, block)

    @torch.no_grad()
    def _begin(self, joined: bool) -> None:
        """A tensor comes, maybe as a further part of what this watches."""
        if not joined:
            self._waits = self.delay > 0
        if self.joins and (self.state is State.OBSERVE or (self.state is State.TRAIN and self.training)):
            self.observer.begin(joined)

    def _rows(self, x: Tensor) -> Tensor:
        """A row for each block."""
        source = self.source or "a tensor"
        rows = to_rows(x, self.spec.block, source)
        self._counts = counts(x.shape, self.spec.block, source)
        if not self._sized:
            self._make(len(rows))
            self.to(x.device).train(self.training)
            self._sized = True
        if len(rows) != self.scale.numel():
            raise InvalidArgument(
                f"{self.source}: {len(rows)} blocks of {list(self.spec.block)} in shape {list(x.shape)}, "
                f"{self.scale.numel()} before; a block must span the dimensions whose size varies (-1)"
            )
        return rows

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """How many blocks there are along each dimension, once a tensor has passed; None without blocks."""
        return None if self.spec.block is None else self._counts

    def watch(self, x: Tensor) -> None:
        """Lets the observer see `x`, whatever the state."""
        self.observer.observe(x if self.spec.block is None else self._rows(x))

    def _as_state_says(self, x: Tensor, clamp: Limits, joined: bool) -> Tensor:
        state = self.state
        if state is State.OFF or state is State.FROZEN_OFF:
            return limited(x, clamp)
        if state is State.OBSERVE:
            x = limited(x, clamp)
            if self.forgets:
                self.observer.reset()
            self.observer.observe(x)
            return x
        if state is State.TRAIN and self.delay > 0 and not self.training:
            return limited(x, clamp)
        is_part = x.numel() > 0 or (not self.is_weight and is_distributed())  # the other ranks wait for this one
        if state is State.TRAIN and self.training and self.rule is not None and is_part:
            if self._waits:
                return self._wait(limited(x, clamp), joined)
            if self.rule.observes or not self._chosen:
                return self._follow(x, clamp)
        return self.on_grid(x, clamp)

    def on_grid(self, x: Tensor, clamp: Limits = None) -> Tensor:
        """`x`, limited to `clamp`, rounded to the grid of now."""
        if x.dtype != torch.float32 and (self.rule is None or x.dtype not in (torch.float16, torch.bfloat16)):
            known = "float32" if self.rule is None else "float32, bfloat16 and float16"
            under_autocast = (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(x.device.type)
            cure = "; call the model outside of torch.autocast" if under_autocast else ""
            raise InvalidType(f"the quantizer of {self.source or 'a tensor'} takes {known}, got {x.dtype}{cure}")
        if not self._chosen:
            if x.numel() == 0 or self.delay > 0:
                return limited(x, clamp)
            # A grid may have been copied into the buffers, as by an average of models.
            self._chosen = not torch.compiler.is_compiling() and self.has_grid()
        if not self._chosen:
            raise InvalidState(
                f"the quantizer of {self.source} has no grid yet: run a training batch, or batches inside `calibrating`"
            )
        if self.rule is not None and not self._fused:
            return self.rule(limited(x, clamp), *self._ruled_grid())
        return self._round(x, self.scale, self.zero_point, clamp)

    def _ruled_grid(self) -> tuple[Tensor, Tensor]:
        """The grid of the rule, which learns nothing while it is frozen."""
        scale, zero_point = self.rule.grid(self.scale, self.zero_point)
        return (scale.detach(), zero_point.detach()) if self.state is State.FROZEN else (scale, zero_point)

    def _round(self, x: Tensor, scale: Tensor, zero_point: Tensor, clamp: Limits) -> Tensor:
        """Straight through."""
        qmin, qmax = self.spec.qmin, self.spec.qmax
        if self.is_weight:  # x is kept anyway; the grid may move before the backward
            if torch.is_grad_enabled() and x.requires_grad:
                scale, zero_point = scale.clone(), zero_point.clone()
            return ops.fake_quant(x, scale, zero_point, self.axis, qmin, qmax)
        # Codes are made in the same pass if they will be read.
        wanted = self.gives_codes and self.training and x.dtype == torch.float32 and (x.is_cpu or x.is_cuda)
        floor, ceiling = clamp or (None, None)
        if not wanted or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            limits = {"floor": floor, "ceiling": ceiling}
            return ops.fake_quant(x, scale, zero_point, self.axis, qmin, qmax, "mask", **limits)
        y, codes = ops.fake_quant_codes(x, scale, zero_point, qmin, qmax, self.spec.dtype, floor, ceiling)
        self._ready = weakref.ref(y), codes
        return y

    def takes_norm(self, x: Tensor, clamp: Limits) -> bool:
        """Whether `normalized` stands for a batch normalization of `x` and `forward` behind it now."""
        if not (self.training and self.rounds) or self.axis is not None:
            return False
        if self.observer.non_finite is not None or self.spec.uneven or is_distributed():
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        if isinstance(self.rule, LearnedStep):
            return not self.rule.plain and (clamp is None or clamp[0] == 0.0 or math.inf not in map(abs, clamp))
        return self._fused

    def normalized(self, x: Tensor, norm: Norm, clamp: Limits, joined: bool) -> Tensor:
        """What `forward` gives for the normalized `x`, which passes here unchanged afterwards."""
        self._begin(joined)
        statistics, spec = norm.statistics(x), self.spec
        floor, ceiling = clamp or (None, None)
        factor = None
        if isinstance(self.rule, LearnedStep):
            scale, zero_point = self._ruled_grid()
            factor = self.rule.grad_factor(x.numel())
        else:
            if self.follows:
                self._observe(statistics.extremes, clamp, x)
            scale, zero_point = self.scale, self.zero_point
        codes = spec.dtype if self.gives_codes else None
        grid = scale, zero_point, spec.qmin, spec.qmax, floor, ceiling, codes, factor
        y, codes = ops.batch_norm_fake_quant(x, norm.weight, norm.bias, statistics, *grid)
        self._ready = (weakref.ref(y), codes) if self.gives_codes else None
        self._done = weakref.ref(y)
        return y

    def _wait(self, x: Tensor, joined: bool) -> Tensor:
        """A training step before rounding begins; the last one chooses the grid, whatever it was before."""
        self.delay -= self.counts and not joined
        if self.is_weight:
            self._chosen = False
            self.scale.zero_()
        if self.delay == 0:
            self._measure(x)
        elif not self.forgets:
            self.observer.observe(x, merged=not self.is_weight)
        if is_distributed() and torch.is_grad_enabled():
            for parameter in self.rule.parameters():
                x = x + 0.0 * parameter.sum()  # DistributedDataParallel waits for a gradient of each
        return x

    def _follow(self, x: Tensor, clamp: Limits) -> Tensor:
        """Lets the grid follow `x`, or start from it, and rounds `x` to it."""
        if self._fused:
            if self.forgets:
                return self._fresh(x, None)[0]
            if self.is_weight or not is_distributed():
                return self._observe_fake_quant(x, clamp)
        x = limited(x, clamp)
        self._measure(x)
        if not self._chosen:
            return x
        # Not the buffers: those change before the backward if this is called twice.
        return self.rule(x, *self.rule.grid(self.scale.clone(), self.zero_point.clone()))

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        """Lets the grid follow `x`, or start from it."""
        if self.forgets:
            self.observer.reset()
        scale = self.rule.measure(x)
        if scale is None or not self._chosen:
            self.observer.observe(x, merged=not self.is_weight)
            if not self._chosen and is_distributed() and not self.observer.has_data():
                return  # the batches of all ranks were empty
            self._take_grid_of_observer()
        if scale is not None:
            self.scale.copy_(scale)
        self._take_over(x)

    def _fresh(self, x: Tensor, code_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """A weight on the grid of its own extremes, and its codes if asked, within one op."""
        spec = self.spec
        if not _rows_lie_in_order(x):
            x = x.contiguous()
        grid = spec.qmin, spec.qmax, spec.symmetric, spec.min_scale, code_dtype
        try:
            (y,), codes, (scale,), (zero_point,) = ops.foreach_observe_fake_quant((x,), (self.axis,), *grid)
        except RuntimeError:
            self.observer.check_finite(x)
            raise
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self._chosen = True
        return y, codes[0] if codes else None

    @property
    def passes_gradients(self) -> bool:
        """Whether a weight that comes now gets the gradient of its rounded form as it is: its extremes are the ends."""
        spec = self.spec
        fresh = self._fused and self.forgets and self.follows and self.delay == 0
        return fresh and spec.symmetric and spec.qmin == -spec.qmax

    def with_codes(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """A weight as `forward` gives it, its codes and grid; without a graph if it `passes_gradients`."""
        if self.passes_gradients:
            with torch.no_grad():
                return *self._fresh(x, self.spec.dtype), self.grid()
        y = self(x)
        grid = self.grid()
        return y, self.codes(y.detach(), grid), grid

    def _observe_fake_quant(self, x: Tensor, clamp: Limits) -> Tensor:
        """The grid follows within one op."""
        if self.is_weight:
            try:
                y = ops.observe_fake_quant(x, *self._observed_state())
            except RuntimeError:
                self.observer.check_finite(x)
                raise
            self._chosen = True
            return y
        self._observe(x.detach(), clamp)
        if not torch.compiler.is_compiling():  # the bits that are kept do not depend on the buffers
            return self._round(x, self.scale, self.zero_point, clamp)
        return self._round(x, self.scale.clone(), self.zero_point.clone(), clamp)

    def _observed_state(self) -> tuple:
        """What the observing ops take behind the tensor."""
        observer, spec = self.observer, self.spec
        state = observer.low, observer.high, self.scale, self.zero_point, observer.non_finite
        momentum = getattr(observer, "momentum", None)
        return *state, self.axis, spec.qmin, spec.qmax, spec.symmetric, spec.min_scale, momentum, observer.source

    def _observe(self, x: Tensor, clamp: Limits, *of: Tensor) -> None:
        """Observer and grid follow `x` behind `clamp`; a fault is looked for in `of` first."""
        seen = self.observer.rewind()
        try:
            ops.observe(x, *self._observed_state(), *(clamp or (None, None)))
        except RuntimeError:
            if seen is not None:
                self.observer.join(*seen)
            for tensor in (*of, x):
                self.observer.check_finite(tensor)
            raise
        if seen is not None:
            self.observer.join(*seen)
            self._take_grid_of_observer()
        self._chosen = True

    def _take_grid_of_observer(self) -> None:
        scale, zero_point = grid_values(self.spec, *self.observer.range())
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _take_over(self, x: Tensor | None = None) -> None:
        if not self._chosen and self.rule is not None:
            self.rule.start(x, self.scale, self.zero_point)
            if not self.is_weight and not self.rule.observes and is_distributed():
                mean_over_ranks(self.scale)  # each has seen its own part of the batch
        self._chosen = True

    def has_grid(self) -> bool:
        return bool((self.scale > 0).all())

    def qparams(self) -> QParams:
        """The chosen grid."""
        if not self.has_grid():
            raise InvalidState(
                f"{self.source} has no grid yet: run the model on batches first, one of `qkernels.prepare` inside "
                "`with qkernels.calibrating(model):`"
            )
        spec = self.spec
        scale, zero_point = self.grid()
        return QParams(scale.clone(), zero_point.clone(), self.axis, spec.qmin, spec.qmax, spec.dtype, spec.block)

    @property
    def rounds(self) -> bool:
        """Whether forward rounds, in a batch that comes now."""
        return self._chosen and self.delay == 0 and self.state in ROUNDING

    @property
    def rounded(self) -> bool:
        """Whether the tensor that came last was rounded."""
        return self.rounds and not self._waits

    @property
    def follows(self) -> bool:
        """Whether forward changes the grid, in a batch that comes now."""
        return self.training and self.state is State.TRAIN and self.rule.observes

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and int32 zero point of now, unchecked."""
        if self.rule is None or self._fused:
            return self.scale, self.zero_point
        with torch.no_grad():
            scale, zero_point = self.rule.grid(self.scale, self.zero_point)
            if zero_point.is_floating_point():
                zero_point = torch.round(zero_point).clamp(self.spec.qmin, self.spec.qmax).to(torch.int32)
        return scale, zero_point

    def numbers(self) -> tuple[float, int]:
        """Scale and zero point of a per-tensor grid."""
        scale, zero_point = self.grid()
        return scale.item(), zero_point.item()

    def codes(self, x: Tensor, grid: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The codes of values that lie on the grid (`grid()`, if it is known); `x` is detached or there is no grad."""
        spec, ready, self._ready = self.spec, self._ready, None
        if ready is not None and ready[0]() is x:
            return ready[1]
        return ops.quantize(x, *(grid or self.grid()), self.axis, spec.qmin, spec.qmax, spec.dtype)

    def set_qparams(self, grid: QParams) -> None:
        """Takes the grid `grid`; the state stays."""
        spec = self.spec
        wanted = (spec.qmin, spec.qmax, spec.dtype, self.axis, spec.block)
        if (grid.qmin, grid.qmax, grid.dtype, grid.axis, grid.block) != wanted:
            raise InvalidState(f"{self.source}: {grid} is not a grid of kind {self.spec}")
        if not self._sized:
            self._make(grid.scale.numel())
            self._sized = True
        with torch.no_grad():
            self.scale.copy_(grid.scale)
            self.zero_point.copy_(grid.zero_point)
        self._chosen = False
        self._take_over()

    def take_range(self, low: Tensor, high: Tensor) -> None:
        """Takes the grid for the range from `low` to `high`, and lets the observer go on from there."""
        if not self._sized:
            self._make(low.numel())
            self._sized = True
        low, high = low.reshape(-1), high.reshape(-1)
        self.observer.low.copy_(low)
        self.observer.high.copy_(high)
        self.set_qparams(choose_qparams(self.spec, low, high))

    @torch.no_grad()
    def take_ends(self, low: Tensor, high: Tensor) -> None:
        """Takes the trained ends `low` and `high` as they are, of a rule with ends; the grid follows from them."""
        self.rule.low.copy_(low.reshape(self.rule.low.shape))
        self.rule.high.copy_(high.reshape(self.rule.high.shape))
        self.zero_point.fill_(self.spec.middle if self.spec.symmetric else 0)
        self._chosen = True
        scale, zero_point = self.grid()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def change_kind(self, recipe: TensorRecipe) -> None:
        """Another kind of grid, for as many channels; the rule keeps its Parameters, and with them the range."""
        self.recipe, old = recipe, self.observer
        size = old.low.numel()
        self.observer = make_observer(recipe.observer, recipe.spec, size, **dict(recipe.options)).to(old.low.device)
        self.observer.source, self.rule.spec = old.source, recipe.spec
        if self.has_grid():
            self.take_ends(self.rule.low, self.rule.high)

    def choose(self, x: Tensor | None = None) -> None:
        """Takes the grid that the observer proposes, or what the rule makes of it for `x`, the tensor that it saw."""
        self.set_qparams(self.observer.qparams())
        if x is not None and self.rule is not None:
            self.rule.start(x if self.spec.block is None else self._rows(x), self.scale, self.zero_point)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        dtype = fn(torch.empty(0, dtype=torch.float32, device=self.scale.device)).dtype
        if dtype != torch.float32:
            raise InvalidType(
                f"the quantizer of {self.source or 'a tensor'} keeps its grid in float32 and cannot become {dtype}: "
                "train in other dtypes under torch.autocast"
            )
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([int(self.state), self.delay], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.state, self.delay = State(int(state[0])), int(state[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None, "_done": None}

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._chosen = self.has_grid()

    def extra_repr(self) -> str:
        return f"{self.source}, {self.state.name}, {self.spec.dtype}, observer={self.recipe.observer}"


def limited(x: Tensor, clamp: Limits) -> Tensor:
    """`x` inside the two numbers, by the function whose gradient is the fastest."""
    if clamp is None:
        return x
    if clamp == (0.0, math.inf):
        return F.relu(x)
    return torch.clamp(x, *clamp) if math.inf in map(abs, clamp) else F.hardtanh(x, *clamp)


def _rows_lie_in_order(x: Tensor) -> bool:
    """Whether dimension 0 is outermost in dense memory."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


class Substitute(torch.autograd.Function):
    """`exact` with the gradient of `simulated`."""

    @staticmethod
    def forward(ctx: Any, simulated: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
