"""`compile`: a converted model as a plan."""

import warnings
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core.convert import ConvertedModel
from qkernels.core.expect import expect_inputs, expect_module, expect_runs
from qkernels.core.operations import Value
from qkernels.errors import InvalidArgument, QKernelsError, Unsupported
from qkernels.plan.format import plan_bytes
from qkernels.plan.islands import Part, cut, follow_layouts, result_part, torch_module
from qkernels.plan.lower import Lowered, lower_graph
from qkernels.plan.plan import Plan, PlanWithIslands
from qkernels.plan.steps import Network


def graph_of(converted: nn.Module) -> ConvertedModel:
    """The model as one graph.

    Raises:
        InvalidArgument: the model is not converted.
        Unsupported: it could not be traced as a whole.
    """
    if isinstance(converted, ConvertedModel):
        return converted
    parts = [path for path, m in converted.named_modules() if isinstance(m, ConvertedModel)]
    if parts:
        raise Unsupported(
            f"compile: {type(converted).__name__} has no static graph as a whole; these parts have one and can be "
            f"compiled each by itself: {', '.join(parts[:8])}{', ...' if len(parts) > 8 else ''}"
        )
    if any(hasattr(m, "reference_forward") for m in converted.modules()):
        raise Unsupported(
            f"compile: {type(converted).__name__} has no static graph: its layers were converted one by one, and its "
            "Python code runs between them. It runs as modules"
        )
    raise InvalidArgument(
        f"compile: {type(converted).__name__} has no integer layer: it must come from `convert` or `load`, and "
        "something in it must be integer"
    )


def record(model: fx.GraphModule, arguments: tuple[Any, ...]) -> dict[fx.Node, Value]:
    """What every node of the graph gives on the example."""
    recorder = _Recorder(model)
    try:
        with torch.no_grad():
            recorder.run(*arguments)
    except Exception:
        expect_runs("compile", model, arguments, {})  # says it without the interpreter's account of the graph
        raise
    return recorder.recorded


class _Recorder(fx.Interpreter):
    def __init__(self, model: fx.GraphModule):
        super().__init__(model)
        self.recorded: dict[fx.Node, Value] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        self.recorded[node] = Value.of(result)
        return result


def example_arguments(model: ConvertedModel, example_inputs: Any) -> tuple[Any, ...]:
    """The example as positional arguments of the graph."""
    args, kwargs = g.arguments(example_inputs)
    return tuple(g.bind(model, args, kwargs).values())


def compile(converted: nn.Module, example_inputs: Any) -> Plan | PlanWithIslands:
    """A converted model as a plan: one native call, with the same bits.

    The plan takes every batch and spatial size. Operations without a step (softmax, attention, ...) run in torch, as
    islands between native parts; a warning says so and `plan.islands` lists them.

    Args:
        converted: from `convert` or `load`.
        example_inputs: what to call the model with, as for `prepare`.

    Raises:
        Unsupported: the model has no static graph as a whole, or returns no tensor; it runs as modules.
        InvalidArgument: the model is not converted, or does not run on the example.
        InvalidType: `converted` is no module, or the example holds no tensor.
    """
    expect_module("compile", converted, "converted")
    expect_inputs("compile", example_inputs, "example_inputs")
    model = graph_of(converted)
    arguments = example_arguments(model, example_inputs)
    recorded = record(model, arguments)
    lowered = lower_graph(model.graph, model, recorded)
    if lowered.refused:
        plan = _with_islands(model, lowered, recorded)
    elif not lowered.network.outputs:
        raise Unsupported("compile: the model returns no tensor, so there is nothing to compute: call it as it is")
    else:
        plan = _plan(lowered.network, [tuple(x.shape) for x in arguments])
    _check(plan, model, arguments)
    return plan


def _plan(network: Network, example: list[tuple[int, ...]]) -> Plan:
    network.metadata["example"] = example
    return Plan(bytes(plan_bytes(network)))


def _with_islands(model: ConvertedModel, lowered: Lowered, recorded: dict[fx.Node, Value]) -> PlanWithIslands:
    names = {node: str(node.target) for node in model.graph.nodes if node.op == "placeholder"}
    for node in names:
        if recorded[node].kind != "tensor":
            hint = "; leave it out of the example, so that it has its default" if node.args else ""
            raise Unsupported(f"compile: {lowered.refused[node]}{hint}")
    pieces, refused = _pieces(model, lowered, recorded)
    parts = []
    for part, network in pieces:
        shapes = [v.shape for n, v in part.recorded.items() if n.op == "placeholder"]
        module = torch_module(part, model) if network is None else _plan(network, shapes)
        parts.append((module, part.inputs, part.outputs))
    result = result_part(model.graph, recorded)
    islands = {node.name: why for node, why in refused.items() if node.op != "get_attr"}
    if islands:
        warnings.warn(
            f"compile: torch runs {len(islands)} operations that have no integer step "
            f"({', '.join(list(islands)[:4])}{', ...' if len(islands) > 4 else ''}); plan.islands says why",
            stacklevel=3,
        )
    wiring = {node.name: name for node, name in names.items()}
    return PlanWithIslands(parts, wiring, (torch_module(result, model), result.inputs), islands)


def _pieces(
    model: ConvertedModel, lowered: Lowered, recorded: dict[fx.Node, Value]
) -> tuple[list[tuple[Part, Network | None]], dict[fx.Node, str]]:
    """The parts, native ones with their networks; and why nodes are in none of these.

    What a native part cannot do though the whole graph could, because sizes are open that other parts know, is cut out
    too.
    """
    refused = dict(lowered.refused)
    while True:
        views = follow_layouts(model, refused, recorded)
        parts = cut(model.graph, refused.keys() | views, recorded)
        pieces = [(p, lower_graph(p.graph, model, p.recorded, lowered.sizes) if p.native else None) for p in parts]
        found = {p.sources[node]: why for p, piece in pieces if piece for node, why in piece.refused.items()}
        if not found:
            return [(part, piece and piece.network) for part, piece in pieces], refused
        if found.keys() <= refused.keys():
            raise QKernelsError(f"compile: {found} in a part that was found native: please report")
        refused |= found


def _check(plan: nn.Module, model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """The plan must give the bits of the modules on the example."""
    with torch.no_grad():
        if not g.close(model(*arguments), plan(*arguments), 0.0):
            raise QKernelsError("compile: the plan gives other outputs on the example than the modules: please report")
