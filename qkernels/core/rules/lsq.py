"""LSQ: the scale is learned; the zero point stays. Learned step size quantization, Esser et al. 2020."""

import math

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.observers import Mse, is_distributed
from qkernels.core.qspec import MAX_SCALE, MIN_SCALE, QSpec, grid_values
from qkernels.core.rules.base import Rule, grown, moved, rule
from qkernels.errors import InvalidArgument

INITS = ("mean", "mse", "range")


@rule("lsq")
class LearnedStep(Rule):
    """The scale has grown from the first one (`rules.base.grown`): positive whatever the optimizer does, with the steps
    of plain LSQ.

    Args:
        init: the first scale. "mean": 2 * mean|x| / sqrt(Qp), as in the paper; "mse": the scale with the least squared
            error; "range": the observer's; or a number, with the middle of a symmetric grid or the lowest code of
            another one as zero point. None: "mse" for weights, where "mean" is ten times as coarse at 8 bits, and
            "mean" for activations.
        plain: the scale is `first + growth` instead, and its gradient is divided by the size of the whole tensor
            where it otherwise goes by that of a channel: the steps of plain LSQ.
    """

    observes = False

    def __init__(
        self,
        spec: QSpec,
        channels: int | None = None,
        is_weight: bool = False,
        init: str | float | None = None,
        plain: bool = False,
    ):
        super().__init__(spec, channels, is_weight)
        init = init or ("mse" if is_weight else "mean")
        if init not in INITS and not (isinstance(init, float) and MIN_SCALE <= init <= MAX_SCALE):
            raise InvalidArgument(f"lsq: init must be one of {list(INITS)} or a positive number, got {init!r}")
        self.init, self.plain = init, plain
        self.growth = nn.Parameter(torch.zeros(self.size, dtype=torch.float32, device="cpu"))

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        self.growth.zero_()
        if isinstance(self.init, float) and x is not None:  # a grid that is given, and was chosen for nothing, stays
            scale.fill_(self.init)
            zero_point.fill_(self.spec.middle if self.spec.symmetric else self.spec.qmin)
            return
        if x is None or self.init == "range":
            return
        if self.init == "mse":
            scale.copy_(self.least_error(x)[0])
            return
        zero_point.copy_(self.end_or_middle(zero_point))
        x = x.float()
        rows = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)
        mean = rows.abs().mean(1)
        first = 2.0 * mean / torch.sqrt((self.spec.qmax - zero_point).clamp(min=1).float())
        scale.copy_(torch.where(first > MIN_SCALE, first.clamp(max=MAX_SCALE), scale))

    def least_error(self, x: Tensor) -> tuple[Tensor, Tensor]:
        search = Mse(self.spec, self.size).to(x.device)
        search.observe(x, merged=not self.is_weight)
        if not self.is_weight and is_distributed():
            search.merge()
        return grid_values(self.spec, *search.range())

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        learned = moved if self.plain else grown
        return learned(self.growth, scale), zero_point.to(torch.float32)

    def grad_factor(self, elements: int) -> float:
        """What the gradients of the grid of a tensor with so many elements are multiplied by."""
        spec = self.spec
        positive = spec.qmax - (spec.middle if spec.symmetric else spec.qmin)
        if self.plain and spec.qmin == -spec.qmax:
            positive = spec.qmax
        count = elements if self.plain else elements // self.size
        return 1.0 / math.sqrt(max(count, 1) * positive)

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        grid = scale, zero_point, self.axis, self.spec.qmin, self.spec.qmax
        return ops.lsq(x, *grid, self.grad_factor(x.numel()))
