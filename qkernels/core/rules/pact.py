"""PACT: activations are clipped at a learned level. Choi et al. 2018. Weights are straight-through."""

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.qspec import MIN_SCALE, QSpec
from qkernels.core.rules.base import Rule, grown, rule


@rule("pact")
class LearnedClip(Rule):
    """Values above the learned level become the level, which gets the sum of their gradients.

    The level has grown from the first one (`rules.base.grown`), so it stays positive. Data that reaches below zero is
    clipped at minus the level too.
    """

    def __init__(self, spec: QSpec, channels: int | None = None, is_weight: bool = False):
        super().__init__(spec, channels, is_weight)
        self.observes = is_weight
        self.growth = None if is_weight else nn.Parameter(torch.zeros(self.size, dtype=torch.float32, device="cpu"))

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        if self.growth is not None:
            self.growth.zero_()

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        if self.growth is None:
            return scale, zero_point
        steps = (self.spec.qmax - zero_point).clamp(min=1)
        return (grown(self.growth, scale * steps) / steps).clamp(min=MIN_SCALE), zero_point

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        grid = self.axis, self.spec.qmin, self.spec.qmax
        if self.growth is None:
            return ops.fake_quant(x, scale, zero_point, *grid)
        return ops.pact(x, scale, zero_point, *grid)
