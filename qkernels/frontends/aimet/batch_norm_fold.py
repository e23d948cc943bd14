"""fold_all_batch_norms: batch normalization becomes part of the layer before it."""

from typing import Any

import torch
from torch import fx, nn

from qkernels.core.expect import expect_runs
from qkernels.core.fusion import foldable, folded
from qkernels.core.graph import Untraceable, arguments, replace_module, trace
from qkernels.core.norm import scaled_range
from qkernels.core.phases import evaluating
from qkernels.errors import InvalidArgument, Unsupported


def fold_all_batch_norms(
    model: nn.Module, input_shapes: Any = None, dummy_input: Any = None
) -> list[tuple[nn.Module, nn.Module]]:
    """Folds every batch normalization that directly follows a convolution or linear layer; an Identity takes its place.

    Works on `model` itself, in eval mode statistics. Returns the pairs (layer, batch normalization). Others stay.
    """
    training, pairs = model.training, []
    traced = graph_of(model, input_shapes, dummy_input, "fold_all_batch_norms")
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


def fold_all_batch_norms_to_scale(sim: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Folds what `fold_all_batch_norms` would fold, but in a simulation: weights keep their codes, grids are scaled.

    Needs a calibrated grid for each channel of the weight. Returns the pairs (layer, batch normalization).
    """
    pairs = []
    for path, norm_path in sim.foldable:
        layer, norm = sim.model.get_submodule(path), sim.model.get_submodule(norm_path)
        quantizer = layer.param_quantizers["weight"]
        if quantizer is None or quantizer.axis is None or not quantizer.has_grid():
            raise Unsupported(f"fold_all_batch_norms_to_scale: {path} has no calibrated grid for each channel")
        made = folded(layer, norm)
        with torch.no_grad():
            layer.weight.copy_(made.weight)
        layer.bias = made.bias
        ends = quantizer.min.detach().flatten(), quantizer.max.detach().flatten()
        quantizer.take_ends(*scaled_range(norm, *ends, quantizer.symmetric))
        layer.param_quantizers["bias"], layer.output_quantizers[0] = None, norm.output_quantizers[0]
        replace_module(sim.model, norm_path, nn.Identity().train(norm.training))
        pairs.append((layer, norm))
    sim.foldable = []
    return pairs


def graph_of(model: nn.Module, input_shapes: Any, dummy_input: Any, verb: str) -> fx.GraphModule:
    """The graph of `model`, whose modules are those of the model; `verb` is for the messages."""
    if dummy_input is None:
        if input_shapes is None:
            raise InvalidArgument(f"{verb}: give input_shapes or dummy_input")
        shapes = [input_shapes] if isinstance(input_shapes[0], int) else list(input_shapes)
        device = next((p.device for p in model.parameters()), None)
        dummy_input = tuple(torch.rand(tuple(shape), device=device) for shape in shapes)
    args, kwargs = arguments(dummy_input)
    with evaluating(model):
        try:
            return trace(model, args, kwargs)
        except Untraceable as error:
            expect_runs(f"{verb}: dummy_input or input_shapes", model, args, kwargs)
            raise Unsupported(
                f"{verb}: the model has no graph ({error}); make it one with prepare_model, or name the parts with "
                "control flow in modules_to_exclude"
            ) from None
