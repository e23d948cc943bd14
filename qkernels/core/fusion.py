"""What becomes one integer layer: the table of fusable chains, and batch normalization folded into what it follows.

`FUSED` is the only list. A row says that `second`, directly after `first` and as its only reader, is part of the same
layer: no grid between them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from qkernels.core.graph import arguments, modules_of, replace_module, share, trace
from qkernels.core.lowering import Clamp
from qkernels.core.norm import scale_shift
from qkernels.core.operations import BATCH_NORMS, CLAMPS, MODULES, WEIGHTED, Operation, operation

FUSED: frozenset[tuple[str, str]] = frozenset(
    (first, second) for first in ("linear", "conv", "add", "mul") for second in CLAMPS
)


def is_fused(first: str, second: str) -> bool:
    return (first, second) in FUSED


def clamp_of(op: Operation) -> Clamp:
    """The range that an operation of `CLAMPS` leaves."""

    def number(name: str, default: float) -> float:
        value = op.options.get(name, getattr(op.module, name, None))
        return default if value is None else float(value)

    if op.kind == "relu":
        return Clamp(0.0)
    if op.kind == "relu6":
        return Clamp(0.0, 6.0)
    if op.kind == "hardtanh":
        return Clamp(number("min_val", -1.0), number("max_val", 1.0))
    high = number("max", float("inf"))
    return Clamp(min(number("min", -float("inf")), high), high)  # torch gives the upper limit where they are crossed


def has_constant_clamp(op: Operation) -> bool:
    """Whether the limits are numbers, not tensors or computed values."""
    return all(v is None or isinstance(v, (int, float)) for v in op.options.values())


def fold_batch_norms(traced: fx.GraphModule, keep_float, keep_norms: bool = False) -> dict[str, nn.Module]:
    """Folds each BatchNorm (eval mode) into the layer before it; one that follows none becomes a 1x1 convolution.

    `keep_float(node)` says which nodes the recipe leaves alone. Folding is done in float64 and rounded once. With
    `keep_norms` the layers stay as they are, and the norms that belong to them are returned by the layer's path.
    """
    norms: dict[str, nn.Module] = {}
    modules = modules_of(traced)
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules.get(node.target)) not in BATCH_NORMS or keep_float(node):
            continue
        norm, source = modules[node.target], node.args[0]
        if norm.running_mean is None or norm.running_var is None:
            continue
        before = operation(source, modules)
        if (
            source.op == "call_module"
            and len(source.users) == 1
            and before is not None
            and before.kind in ("linear", "conv")
            and not keep_float(source)
            and source.target not in norms
            and (before.kind == "conv" or len(source.meta["value"].shape) == 2)
        ):
            if keep_norms:
                norms[source.target] = norm
            else:
                replace_module(traced, source.target, folded(before.module, norm))
            source.meta["origin"] = node.meta["origin"]
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
        elif 3 <= len(source.meta["value"].shape) <= 5 and source.meta["value"].is_float:
            dims = len(source.meta["value"].shape) - 2
            if keep_norms:
                norms[node.target] = norm
            replace_module(traced, node.target, ones(norm, dims) if keep_norms else as_convolution(norm, dims))
        modules = modules_of(traced)
    traced.recompile()
    return norms


def foldable(traced: fx.GraphModule) -> list[tuple[str, str]]:
    """The paths of each layer and the batch normalization that directly follows it, and nothing else does."""
    modules = modules_of(traced)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    found = []
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in BATCH_NORMS:
            continue
        before, norm = node.args[0], modules[node.target]
        if before.op != "call_module" or len(before.users) != 1 or norm.running_mean is None:
            continue
        if MODULES.get(type(modules[before.target])) in WEIGHTED and calls.count(before.target) == 1:
            found.append((before.target, node.target))
    return found


def chain_from(
    node: fx.Node,
    kinds: Sequence[str],
    modules: Mapping[str, nn.Module],
    kind_of: Callable[[nn.Module], str],
    passed: Collection[str],
) -> list[fx.Node]:
    """The calls of modules of `kinds` that follow each other from `node` on, each read by the next alone.

    Empty if they do not. An Identity, and the modules at the paths `passed`, may stand between them.
    """
    passed = (*passed, *(path for path, module in modules.items() if type(module) is nn.Identity))
    found: list[fx.Node] = []
    for kind in kinds:
        while found and node.op == "call_module" and node.target in passed and len(node.users) == 1:
            node = next(iter(node.users))
        if node.op != "call_module" or kind_of(modules[node.target]) != kind:
            return []
        found.append(node)
        if len(found) < len(kinds):
            if len(node.users) != 1:
                return []
            node = next(iter(node.users))
    return found


def folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """`layer` followed by `norm` as one layer of the class of `layer`, with Parameters of its own."""
    scale, shift = scale_shift(norm)
    weight = layer.weight.detach().double()
    if getattr(layer, "transposed", False):  # [in, out / groups, ...]: group g of the inputs meets block g of scale
        blocks = weight.reshape(layer.groups, -1, *weight.shape[1:])
        along = scale.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (blocks * along).reshape(weight.shape)
    else:
        weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    result = share(layer)
    result.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
    result.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
    return result


def as_convolution(norm: nn.Module, dims: int) -> nn.Module:
    """The same function as a depthwise 1x1 convolution: one weight a channel, which an integer grid holds exactly."""
    scale, shift = scale_shift(norm)
    channels = scale.numel()
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](channels, channels, 1, groups=channels)
    conv.weight = nn.Parameter(scale.float().reshape(conv.weight.shape))
    conv.bias = nn.Parameter(shift.float())
    return conv.eval()


def ones(norm: nn.Module, dims: int) -> nn.Module:
    """The depthwise 1x1 convolution that changes nothing: what a trained norm with no layer before it belongs to."""
    channels, device = norm.num_features, norm.running_mean.device
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](channels, channels, 1, groups=channels, bias=False)
    conv.weight = nn.Parameter(torch.ones_like(conv.weight, device=device), requires_grad=False)
    return conv.eval()


def norms_behind(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """The path of the batch normalization that alone reads a convolution, by its path; the model is in eval mode."""
    traced = trace(model, *arguments(example_inputs))
    modules, found = modules_of(traced), {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) in BATCH_NORMS:
            before = node.args[0]
            layer = modules.get(before.target) if before.op == "call_module" else None
            if isinstance(layer, nn.modules.conv._ConvNd) and len(before.users) == 1:
                found[before.meta["path"]] = node.meta["path"]
    return found
