"""fold_all_batch_norms: batch normalization becomes part of the layer before it."""

from typing import Any

import torch
from torch import nn

from qkernels.core.fusion import foldable, folded
from qkernels.core.graph import Untraceable, arguments, replace_module, trace
from qkernels.errors import InvalidArgument, Unsupported


def fold_all_batch_norms(
    model: nn.Module, input_shapes: Any = None, dummy_input: Any = None
) -> list[tuple[nn.Module, nn.Module]]:
    """Folds every batch normalization that directly follows a convolution or linear layer; an Identity takes its place.

    Works on `model` itself, in eval mode statistics. Returns the pairs (layer, batch normalization). Others stay.
    """
    if dummy_input is None:
        if input_shapes is None:
            raise InvalidArgument("fold_all_batch_norms: give input_shapes or dummy_input")
        shapes = [input_shapes] if isinstance(input_shapes[0], int) else list(input_shapes)
        device = next((p.device for p in model.parameters()), None)
        dummy_input = tuple(torch.rand(tuple(shape), device=device) for shape in shapes)
    training = model.training
    try:
        traced = trace(model.eval(), *arguments(dummy_input))
    except Untraceable as error:
        raise Unsupported(f"fold_all_batch_norms: the model has no graph ({error}); call prepare_model first") from None
    finally:
        model.train(training)
    pairs = []
    for path, norm in foldable(traced):
        layer = traced.get_submodule(path)
        made = folded(layer, traced.get_submodule(norm))
        with torch.no_grad():
            layer.weight.copy_(made.weight)
            if layer.bias is None:
                layer.bias = made.bias
            else:
                layer.bias.copy_(made.bias)
        pairs.append((layer, traced.get_submodule(norm)))
        replace_module(model, norm, nn.Identity().train(training))
    return pairs
