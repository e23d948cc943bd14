"""`compare`: the signal-to-noise ratio of every layer of an integer network against the float one."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.core import graph as g
from qkernels.core.convert import ConvertedModel
from qkernels.core.expect import expect_batches, expect_converted, expect_inputs, expect_module
from qkernels.core.noise import SignalToNoise
from qkernels.core.outputs import output_tensors
from qkernels.core.plain import plain_copy
from qkernels.errors import InvalidArgument, integer


@dataclass(frozen=True)
class LayerComparison:
    """One layer. `sqnr_db` is 10 log10(sum of squares of the float output / sum of squares of the difference)."""

    name: str
    kind: str
    sqnr_db: float


@dataclass(frozen=True)
class Comparison:
    """Layers in the order of execution, and the network's outputs.

    Errors add up along the network: each layer is measured with everything before it in integers too.
    `top1_agreement` is the share of rows of the first output whose largest entry is in the same place.
    """

    layers: tuple[LayerComparison, ...]
    output_sqnr_db: float
    top1_agreement: float
    samples: int

    def worst(self, count: int = 5) -> tuple[LayerComparison, ...]:
        """The layers with the most noise."""
        return tuple(sorted(self.layers, key=lambda layer: layer.sqnr_db)[: integer("worst: count", count, 0)])

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("output")])
        kinds = max([len(layer.kind) for layer in self.layers] + [len("kind")])
        lines = [f"{'layer':<{width}s}  {'kind':<{kinds}s}  SQNR dB"]
        lines += [f"{layer.name:<{width}s}  {layer.kind:<{kinds}s}  {layer.sqnr_db:7.1f}" for layer in self.layers]
        lines.append(f"{'output':<{width}s}  {'':<{kinds}s}  {self.output_sqnr_db:7.1f}")
        lines.append(f"top-1 agreement {self.top1_agreement:.2%} of {self.samples} rows")
        return "\n".join(lines)


@torch.no_grad()
def compare(float_model: nn.Module, converted: nn.Module, batches: Iterable[Any]) -> Comparison:
    """Runs both networks on `batches` and compares them layer by layer.

    Args:
        float_model: the model given to `prepare`; it runs in eval mode and is not changed.
        converted: what `convert` made of it.
        batches: an iterable of batches: tensors, tuples or lists of arguments, or dicts of keyword arguments.

    Raises:
        InvalidArgument: there is no batch, or the models do not belong together.
        InvalidType: `batches` is one tensor or dict or no iterable, or a batch or an output holds no tensor.
    """
    expect_module("compare", float_model, "float_model")
    expect_converted("compare", converted)
    expect_batches("compare", batches)
    if not any(isinstance(module, ConvertedModel) for module in converted.modules()):
        raise InvalidArgument(
            f"compare: {type(converted).__name__} has no integer layer: it must come from `convert`, and something in "
            "it must be integer"
        )
    was_training = [module for module in float_model.modules() if module.training]
    float_model.eval()
    powers: dict[tuple[str, str], SignalToNoise] = {}
    output, agreeing, rows, traces = SignalToNoise(), 0, 0, {}
    try:
        for batch in batches:
            expect_inputs("compare", batch)
            args, kwargs = g.batch_arguments(float_model, batch)
            expected = output_tensors("compare", float_model(*args, **kwargs))
            got = output_tensors("compare", converted(*args, **kwargs))
            for e, c in zip(expected, got, strict=True):
                output.add(e, c)
            first, second = expected[0], got[0]
            if first.dim() >= 2:
                same = first.flatten(1).argmax(1) == second.flatten(1).argmax(1)
                agreeing, rows = agreeing + int(same.sum()), rows + len(same)
            for path, float_part, part, part_args, part_kwargs in _parts(float_model, converted, args, kwargs):
                if path not in traces:
                    traces[path] = g.trace(plain_copy(float_part), part_args, part_kwargs)
                values = list(g.bind(float_part, part_args, part_kwargs).values())
                _compare_part(path, traces[path], part, values, powers)
    finally:
        for module in was_training:
            module.training = True
    if not powers:
        raise InvalidArgument("compare: needs at least one batch that reaches an integer layer")
    layers = tuple(LayerComparison(name, kind, power.db) for (name, kind), power in powers.items())
    return Comparison(layers, output.db, agreeing / rows if rows else math.nan, rows)


def _parts(
    float_model: nn.Module, converted: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Iterator[tuple[str, nn.Module, ConvertedModel, tuple, dict[str, Any]]]:
    """Each converted graph with its float module and the arguments that the float network calls that with."""
    if isinstance(converted, ConvertedModel):
        yield "", float_model, converted, args, kwargs
        return
    calls: dict[str, tuple[tuple, dict[str, Any]]] = {}
    parts = {path: module for path, module in converted.named_modules() if isinstance(module, ConvertedModel)}
    hooks = []
    for path in parts:

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = path) -> None:
            calls.setdefault(path, (args, kwargs))

        hooks.append(float_model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        float_model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for path, (part_args, part_kwargs) in calls.items():
        yield path, float_model.get_submodule(path), parts[path], part_args, part_kwargs


class _Keeper(fx.Interpreter):
    """Keeps copies of the results of some nodes; copies, because a later node may write in place."""

    def __init__(self, module: fx.GraphModule, names: set[str]):
        super().__init__(module)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.name in self.names and isinstance(result, Tensor):
            self.kept[node.name] = result.clone()
        return result


def _compare_part(
    path: str,
    traced: fx.GraphModule,
    part: ConvertedModel,
    values: list[Any],
    powers: dict[tuple[str, str], SignalToNoise],
) -> None:
    sources = part.meta["sources"]
    reference = _Keeper(traced, set(sources.values()))
    reference.run(*(v.clone() if isinstance(v, Tensor) else v for v in values))
    layers = {
        node.name: node.target for node in part.graph.nodes if node.op == "call_module" and node.target in sources
    }
    integer = _Keeper(part, set(layers))
    integer.run(*values)
    for node_name, target in layers.items():
        layer, expected = part.get_submodule(target), reference.kept.get(sources[target])
        got = integer.kept.get(node_name)
        if layer.kind == "dequantize" or expected is None or got is None:
            continue
        if layer.out_qparams is not None:
            got = layer.out_qparams.dequantize(got)
        name = f"{path}.{target}" if path else target
        powers.setdefault((name, layer.kind), SignalToNoise()).add(expected, got)
