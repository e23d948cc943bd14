"""LSQ+: scale and zero point are learned, for activations that are not symmetric. Bhalgat et al. 2020."""

import torch
from torch import Tensor, nn

from qkernels.core.qspec import QSpec
from qkernels.core.rules.base import rule
from qkernels.core.rules.lsq import LearnedStep


@rule("lsq_plus")
class LearnedStepAndOffset(LearnedStep):
    """As `lsq`; on affine grids the zero point moves too, and is rounded once, the same way in training and convert.

    Args:
        init: as in `lsq`, "range" by default: the observer's grid fits data that is not symmetric.
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
        self.offset = None if spec.symmetric else nn.Parameter(torch.zeros(self.size))

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        observed = zero_point.clone()
        super().start(x, scale, zero_point)
        if self.offset is not None:
            self.offset.zero_()
            zero_point.copy_(self.least_error(x)[1] if self.init == "mse" and x is not None else observed)

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().grid(scale, zero_point)
        return scale, zero_point if self.offset is None else zero_point + self.offset
