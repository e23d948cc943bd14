"""BNN: weights and activations become their sign, +1 for zero. Courbariaux et al. 2016."""

import torch
from torch import Tensor

from qkernels import ops
from qkernels.core.qspec import MAX_SCALE, MIN_SCALE, QSpec
from qkernels.core.rules.base import Rule, rule


@rule("bnn")
class Sign(Rule):
    """The gradient passes where |x| <= 1; of a weight beyond that also if it leads back.

    Args:
        scaled: weights become plus or minus their mean magnitude (a channel's, if the grid is per channel) instead of
            plus or minus 1, as in XNOR-Net.
    """

    reshapes = True

    def __init__(self, spec: QSpec, channels: int | None = None, is_weight: bool = False, scaled: bool = False):
        super().__init__(spec, channels, is_weight)
        self.scaled = self.observes = scaled and is_weight
        self.is_sign = not is_weight

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        zero_point.fill_(self.spec.middle)
        if not self.scaled:
            scale.fill_(1.0)

    def measure(self, x: Tensor) -> Tensor | None:
        if not self.scaled:
            return None
        mean = x.detach().float().abs()
        mean = mean.mean().reshape(1) if self.axis is None else mean.movedim(self.axis, 0).flatten(1).mean(1)
        return mean.clamp(MIN_SCALE, MAX_SCALE)

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        sign = ops.binary_sign(x, self.is_weight)
        return sign * scale.reshape(-1, *[1] * (x.dim() - 1)) if self.scaled else sign
