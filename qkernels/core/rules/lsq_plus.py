"""LSQ+: scale and zero point are learned, for activations that are not symmetric. Bhalgat et al. 2020."""

import torch
from torch import Tensor, nn

from qkernels.core.qspec import QSpec
from qkernels.core.rules.base import rule
from qkernels.core.rules.lsq import LearnedStep


class _Larger(torch.autograd.Function):
    """The same number, with `factor` times the gradient."""

    @staticmethod
    def forward(ctx, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@rule("lsq_plus")
class LearnedStepAndOffset(LearnedStep):
    """As `lsq`; on affine grids the zero point moves too, and is rounded once, the same way in training and convert.

    Args:
        init: as in `lsq`, "range" by default: the observer's grid fits data that is not symmetric.
        plain: as in `lsq`, and the gradient of the zero point is not divided by anything.
    """

    def __init__(
        self,
        spec: QSpec,
        channels: int | None = None,
        is_weight: bool = False,
        init: str | float = "range",
        plain: bool = False,
    ):
        super().__init__(spec, channels, is_weight, init, plain)
        offset = torch.zeros(self.size, dtype=torch.float32, device="cpu")
        self.offset = None if spec.symmetric else nn.Parameter(offset)

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        observed = zero_point.clone()
        super().start(x, scale, zero_point)
        if self.offset is not None:
            self.offset.zero_()
            zero_point.copy_(self.least_error(x)[1] if self.init == "mse" and x is not None else observed)

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.plain and self.offset is not None:
            zero_point = _Larger.apply(zero_point, 1.0 / self.grad_factor(x.numel()))
        return super().forward(x, scale, zero_point)

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().grid(scale, zero_point)
        return scale, zero_point if self.offset is None else zero_point + self.offset
