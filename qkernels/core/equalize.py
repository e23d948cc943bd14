"""Cross-layer equalization: channels of neighbouring convolutions get the same range, so that one grid fits them all.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction (2019).

Where nothing but relu(s x) = s relu(x) for s > 0 stands between two layers, channel i of the first may be divided by
s_i and input channel i of the second multiplied by it: the network computes the same. With r the largest magnitude in a
channel's weights, s_i = r1_i / sqrt(r1_i r2_i) makes both ranges equal; over a depthwise layer in the middle
s12_i = r1_i / cbrt(r1_i r2_i r3_i) and s23_i = cbrt(r1_i r2_i r3_i) / r3_i make all three so. A channel of zeros stays.

Large biases spread what the second layer reads. `absorb_bias` moves the part of them that the relu passes for nearly
all inputs, max(0, beta - 3 |gamma|) of the batch normalization that was folded, into the bias of the second layer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from qkernels.core.graph import modules_of
from qkernels.core.operations import CONVS
from qkernels.errors import InvalidArgument

HOMOGENEOUS = (nn.ReLU, nn.PReLU)
DEVIATIONS = 3.0  # of the folded batch normalization, below which a bias stays
PLAIN, DEPTHWISE = "plain", "depthwise"


@torch.no_grad()
def equalize_network(traced: fx.GraphModule, norms: Mapping[nn.Module, nn.Module]) -> list[tuple[str, ...]]:
    """Equalizes all chains of a traced network, in place, and absorbs biases. Returns the chains.

    norms: the batch normalizations that were folded, by the layer; other layers keep their bias.
    """
    chains = equalizable(traced)
    layers = [[traced.get_submodule(path) for path in chain] for chain in chains]
    factors = [equalize(chain) for chain in layers]
    for chain, paths, between in zip(layers, chains, factors, strict=True):
        for first, second, path, factor in zip(chain, chain[1:], paths, between, strict=False):
            if first in norms and first.bias is not None and second.bias is not None:
                absorb_bias(first, second, factor, norms[first], _is_clamped(traced, path))
    return chains


def _is_clamped(traced: fx.GraphModule, path: str) -> bool:
    """Whether an activation reads the layer at `path`, and not the next layer of its chain."""
    modules = modules_of(traced)
    (reader,) = next(n for n in traced.graph.nodes if n.op == "call_module" and n.target == path).users
    while isinstance(modules[reader.target], nn.Identity):
        (reader,) = reader.users
    return isinstance(modules[reader.target], HOMOGENEOUS)


def equalizable(traced: fx.GraphModule) -> list[tuple[str, ...]]:
    """Chains to equalize, by the paths of their layers in order of execution: (conv or depthwise, conv), or (conv,
    depthwise, conv).

    Between them stands nothing, or one activation of `HOMOGENEOUS`; nothing else reads what is between.
    """
    modules, found = modules_of(traced), []
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    owners = Counter(id(parameter) for path in set(calls) for parameter in modules[path].parameters())
    done: set[str] = set()
    for node in traced.graph.nodes:
        if _kind(node, modules) is None or node.target in done:
            continue
        run = [node]
        while (following := _next_layer(run[-1], modules)) is not None:
            run.append(following)
        done.update(n.target for n in run)
        parameters = [p for n in run for p in modules[n.target].parameters()]
        if all(calls.count(n.target) == 1 for n in run) and all(owners[id(p)] == 1 for p in parameters):
            found += _chains([(n.target, _kind(n, modules)) for n in run])
    return found


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """ "plain", "depthwise" or "" for a convolution of another kind; None for anything else."""
    layer = modules.get(node.target) if node.op == "call_module" else None
    if not isinstance(layer, CONVS):
        return None
    if layer.groups == 1:
        return PLAIN
    return DEPTHWISE if layer.groups == layer.in_channels == layer.out_channels else ""


def _next_layer(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The convolution that alone reads `node`, past activations that pass a positive factor."""
    while len(node.users) == 1:
        (node,) = node.users
        if _kind(node, modules) is not None:
            return node
        module = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(module, (*HOMOGENEOUS, nn.Identity)):
            return None
    return None


def _chains(run: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The chains of a run of layers; neighbouring chains share a layer."""
    found, at = [], 0
    while at + 1 < len(run):
        paths, kinds = zip(*run[at : at + 3], strict=True)
        if kinds[:3] == (PLAIN, DEPTHWISE, PLAIN):
            found.append(paths)
            at += 2
            continue
        if kinds[0] and kinds[1] == PLAIN:
            found.append(paths[:2])
        at += 1
    return found


@torch.no_grad()
def equalize(layers: Sequence[nn.Module]) -> list[Tensor]:
    """Scales the weights and biases of a chain, in place. Returns the factors between each two of its layers."""
    if len(layers) not in (2, 3) or not all(isinstance(layer, CONVS) for layer in layers):
        raise InvalidArgument(f"equalize: two or three convolutions, got {[type(m).__name__ for m in layers]}")
    ranges = [_range(layer, i == len(layers) - 1) for i, layer in enumerate(layers)]
    if len({len(r) for r in ranges}) != 1:
        raise InvalidArgument(f"equalize: the layers do not follow each other: channels {[len(r) for r in ranges]}")
    product = torch.stack(ranges).prod(0)
    common = torch.pow(product, 1.0 / len(layers))
    factors = [_usable(ranges[0] / common), *([_usable(common / ranges[2])] if len(layers) == 3 else [])]
    for layer, factor in zip(layers, factors, strict=False):
        _scale(layer, 1.0 / factor, along_outputs=True)
        if layer.bias is not None:
            layer.bias.mul_(1.0 / factor)
    for layer, factor in zip(layers[1:], factors, strict=True):
        _scale(layer, factor, along_outputs=False)
    return factors


@torch.no_grad()
def absorb_bias(first: nn.Module, second: nn.Module, factor: Tensor, norm: nn.Module, clamped: bool) -> None:
    """Moves what is surely positive of the biases of `first` into those of `second`, in place.

    Args:
        first, second: two layers of a chain, both with a bias.
        factor: the one between them, from `equalize`.
        norm: the batch normalization that was folded into `first`.
        clamped: whether an activation stands between them; otherwise all of the bias moves.
    """
    if not norm.affine:
        return  # the mean of what is normalized is zero
    beta, gamma = norm.bias / factor, norm.weight / factor
    moved = (beta - DEVIATIONS * gamma.abs()).clamp(min=0.0) if clamped else beta
    sums = _outputs_first(second).flatten(2).sum(2)
    first.bias.sub_(moved)
    second.bias.add_(sums[:, 0] * moved if sums.shape[1] == 1 else sums @ moved)


def _outputs_first(layer: nn.Module) -> Tensor:
    """The weight as [outputs, inputs, ...]; a depthwise one as [channels, 1, ...]."""
    return layer.weight.transpose(0, 1) if layer.transposed and layer.groups == 1 else layer.weight


def _range(layer: nn.Module, of_inputs: bool) -> Tensor:
    """The largest magnitude of each output channel, or of each input channel."""
    weight = _outputs_first(layer).detach().abs()
    return (weight.transpose(0, 1) if of_inputs and layer.groups == 1 else weight).flatten(1).amax(1)


def _usable(factor: Tensor) -> Tensor:
    """1 where there is nothing to divide by or to scale."""
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)


def _scale(layer: nn.Module, factor: Tensor, along_outputs: bool) -> None:
    dimension = 0 if layer.groups > 1 else int(along_outputs == layer.transposed)
    layer.weight.mul_(factor.reshape([-1 if d == dimension else 1 for d in range(layer.weight.dim())]))
