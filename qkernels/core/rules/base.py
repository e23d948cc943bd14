"""The table of training rules, and what a rule is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qkernels.core.qspec import MAX_SCALE, MIN_SCALE, QSpec
from qkernels.errors import InvalidArgument

RULES: dict[str, type["Rule"]] = {}


def rule(name: str) -> Callable[[type["Rule"]], type["Rule"]]:
    """Enters the decorated class into the table of rules as `name`."""

    def register(cls: type["Rule"]) -> type["Rule"]:
        if name in RULES:
            raise InvalidArgument(f"rule: the name {name!r} is taken by {RULES[name].__qualname__}")
        RULES[name] = cls
        return cls

    return register


def make_rule(name: str, spec: QSpec, channels: int | None = None, is_weight: bool = False, **options) -> "Rule":
    """The rule `name` for grids of kind `spec`; `channels` is the size of `spec.axis` if it is per channel."""
    if name not in RULES:
        raise InvalidArgument(f"unknown rule {name!r}; there are {sorted(RULES)}")
    return RULES[name](spec, channels, is_weight, **options)


class Rule(nn.Module):
    """Base class. A rule maps a tensor to values on a grid, differentiably, and says which grid that is.

    The Quantizer keeps a first grid in buffers, the observer's; `grid` gives the one in use.

    observes: the grid follows the observer, batch by batch; otherwise the observer gives the first grid only.
    reshapes: a weight is changed by more than rounding, so that a batch norm is folded behind the rule.
    is_sign: an activation becomes plus or minus the scale.
    """

    observes = True
    reshapes = False
    is_sign = False

    def __init__(self, spec: QSpec, channels: int | None = None, is_weight: bool = False):
        super().__init__()
        self.spec = spec
        self.size = channels if spec.per_channel else 1
        self.is_weight = is_weight
        if is_weight and type(self).reshapes and spec.middle != 0:
            raise InvalidArgument(f"{type(self).__name__}: weights need a grid around 0, got {spec}")

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.per_channel else None

    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        """Changes the first grid in place if the rule wants another; `x` is the tensor it was chosen for, if known."""

    def measure(self, x: Tensor) -> Tensor | None:
        """The scale for `x` where the rule has a formula of its own instead of an observer."""
        return None

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and (float or int32) zero point in use, given the first or observed grid."""
        return scale, zero_point

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`x` on the grid that `grid` gave, with the gradients of this rule."""
        raise NotImplementedError

    def end_or_middle(self, zero_point: Tensor) -> Tensor:
        """The middle of the codes where the observed grid reaches below zero in any channel, else the first code."""
        spec = self.spec
        below = (zero_point > spec.qmin).any() | spec.symmetric
        return torch.where(below, spec.middle, spec.qmin).to(zero_point.dtype).expand_as(zero_point)


class _Grown(torch.autograd.Function):
    """`first * (1 + growth)`, or `first * exp(growth)` below zero; the two meet there with the same slope.

    The gradient by growth is that of the result divided by its slope, so that a step of SGD changes the result by as
    much as it would change a plain Parameter, upwards exactly so, while the result stays positive whatever the step.
    Optimizers that normalize gradients take steps relative to the first result.
    """

    @staticmethod
    def forward(ctx, growth: Tensor, first: Tensor) -> Tensor:
        shrunk = torch.exp(growth.clamp(max=0.0))
        ctx.save_for_backward(first * shrunk)
        return (first * (shrunk + growth.clamp(min=0.0))).clamp(MIN_SCALE, MAX_SCALE)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad / slope.clamp(min=MIN_SCALE), None


class _Bounded(torch.autograd.Function):
    """A sum inside the bounds of scales; the gradient passes as if there were none, and so leads back inside."""

    @staticmethod
    def forward(ctx, difference: Tensor, first: Tensor) -> Tensor:
        return (first + difference).clamp(MIN_SCALE, MAX_SCALE)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def moved(difference: Tensor, first: Tensor) -> Tensor:
    """A learned scale by its difference to `first`; as in most papers and packages, it may run into the bounds."""
    return _Bounded.apply(difference, first)


def grown(growth: Tensor, first: Tensor) -> Tensor:
    """A learned positive number: `first` at the beginning, when `growth` is 0. See `_Grown`."""
    return _Grown.apply(growth, first)
