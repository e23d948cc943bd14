"""Embeddings in training: every row of the table goes onto a grid, and rows are looked up in the rounded table."""

import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.core.layers import Prepared
from qkernels.core.lowering import LoweringUnit, lower
from qkernels.core.recipe import Override
from qkernels.core.rules import RULES


class PreparedEmbedding(Prepared, nn.Embedding):
    """The output stays float: a Quantizer behind it puts it onto the grid of what reads it."""

    float_class = nn.Embedding
    float_borders = True
    bias = None

    def has_integer_form(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.quantizers["weight"](self.weight), None)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def lowered(self) -> nn.Module:
        """The layer that looks up codes."""
        weight, _, grid = self.canonical()
        return lower(LoweringUnit("embedding", (), None, self, weight=weight, weight_qparams=grid))


def can_round(module: nn.Module | None, rule: Override) -> bool:
    """Whether this is an embedding whose table can be rounded in training."""
    if type(module) is not nn.Embedding or rule.skip:
        return False
    changes_table = module.max_norm is not None or module.sparse  # in place, or by a gradient that has no dense form
    return not changes_table and not RULES[rule.weight.rule].reshapes
