"""fold_all_batch_norms: batch normalization becomes part of the layer before it."""

from typing import Any

import torch
from torch import fx, nn

from qkernels.core import operations as o
from qkernels.core.fusion import folded
from qkernels.core.graph import Untraceable, arguments, modules_of, replace_module, trace
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
    for path, norm in _foldable(traced):
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


def _foldable(traced: fx.GraphModule) -> list[tuple[str, str]]:
    modules = modules_of(traced)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    found = []
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in o.BATCH_NORMS:
            continue
        before, norm = node.args[0], modules[node.target]
        if before.op != "call_module" or len(before.users) != 1 or norm.running_mean is None:
            continue
        if o.MODULES.get(type(modules[before.target])) in o.WEIGHTED and calls.count(before.target) == 1:
            found.append((before.target, node.target))
    return found
