"""`compile`: a converted model as a plan."""

import warnings
from typing import Any

import torch
from torch import fx, nn

from qkernels.core import graph as g
from qkernels.core.convert import ConvertedModel
from qkernels.core.operations import Value
from qkernels.errors import InvalidArgument, QKernelsError, Unsupported
from qkernels.plan.format import plan_bytes
from qkernels.plan.islands import cut, refuse_overwriting, result_part, torch_module
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
    raise InvalidArgument(f"compile: the model must come from `convert` or `load`, got {type(converted).__name__}")


def record(model: fx.GraphModule, arguments: tuple[Any, ...]) -> dict[fx.Node, Value]:
    """What every node of the graph gives on the example."""
    recorder = _Recorder(model)
    with torch.no_grad():
        recorder.run(*arguments)
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
        Unsupported: the model has no static graph as a whole, or torch would write in place to what a native part
            reads too; it runs as modules.
        InvalidArgument: the model is not converted, or the example does not fit.
    """
    model = graph_of(converted)
    arguments = example_arguments(model, example_inputs)
    recorded = record(model, arguments)
    lowered = lower_graph(model.graph, model, recorded)
    if lowered.refused:
        refuse_overwriting(model, arguments, lowered.refused)
        plan = _with_islands(model, lowered, recorded)
    else:
        plan = _plan(lowered.network, [tuple(x.shape) for x in arguments])
    _check(plan, model, arguments)
    return plan


def _plan(network: Network, example: list[tuple[int, ...]]) -> Plan:
    network.metadata["example"] = example
    return Plan(bytes(plan_bytes(network)))


def _with_islands(model: ConvertedModel, lowered: Lowered, recorded: dict[fx.Node, Value]) -> PlanWithIslands:
    refused = lowered.refused
    arguments = [node for node in model.graph.nodes if node.op == "placeholder"]
    for node in arguments:
        if recorded[node].kind != "tensor":
            raise Unsupported(f"compile: {refused[node]}; leave it out of the example, so that it has its default")
    parts = []
    for part in cut(model.graph, refused, recorded):
        if part.native:
            piece = lower_graph(part.graph, model, part.recorded)
            if piece.refused:
                raise QKernelsError(f"compile: {piece.refused} in a part that was found native: please report")
            shapes = [v.shape for n, v in part.recorded.items() if n.op == "placeholder"]
            module: nn.Module = _plan(piece.network, shapes)
        else:
            module = torch_module(part, model)
        parts.append((module, part.inputs, part.outputs))
    result = result_part(model.graph, recorded)
    islands = {node.name: why for node, why in refused.items() if node.op not in ("get_attr", "output")}
    if islands:
        warnings.warn(
            f"compile: torch runs {len(islands)} operations that have no integer step "
            f"({', '.join(list(islands)[:4])}{', ...' if len(islands) > 4 else ''}); plan.islands says why",
            stacklevel=3,
        )
    names = {node.name: str(node.target) for node in arguments}
    return PlanWithIslands(parts, names, (torch_module(result, model), result.inputs), islands)


def _check(plan: nn.Module, model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """The plan must give the bits of the modules on the example."""
    with torch.no_grad():
        if not g.close(model(*arguments), plan(*arguments), 0.0):
            raise QKernelsError("compile: the plan gives other outputs on the example than the modules: please report")
