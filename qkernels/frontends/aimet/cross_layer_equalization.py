"""equalize_model: neighbouring convolutions get channels of equal range, before a simulation is made."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from qkernels.core.equalize import equalize_network
from qkernels.frontends.aimet.batch_norm_fold import fold_all_batch_norms, graph_of


def equalize_model(model: nn.Module, input_shapes: Any = None, dummy_input: Any = None) -> None:
    """Folds batch normalizations, equalizes, and absorbs large biases, all in `model` itself."""
    pairs = fold_all_batch_norms(model, input_shapes, dummy_input)
    equalize_bn_folded_model(model, input_shapes, pairs, dummy_input)


def equalize_bn_folded_model(
    model: nn.Module,
    input_shapes: Any,
    folded_pairs: Iterable[tuple[nn.Module, nn.Module]],
    dummy_input: Any = None,
) -> None:
    """The same for what `fold_all_batch_norms` left, with the pairs that it returned."""
    equalize_network(graph_of(model, input_shapes, dummy_input, "equalize_bn_folded_model"), dict(folded_pairs))
