"""From the graph of a converted model to a `Network`: walks the nodes in order, each of which appends its steps."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.core import operations as o
from qkernels.core.registry import is_layer
from qkernels.errors import Unsupported
from qkernels.plan import views
from qkernels.plan.layers import lower_layer
from qkernels.plan.steps import MAX_RANK, Dynamic, Network, StepKind, Value

DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float16)
Sizes = Sequence[int | None]


@dataclass
class Lowered:
    """A network, and why nodes of the graph are not in it. With such nodes the network is only a rehearsal.

    `sizes`: of the tensors by the names of their nodes, as far as every call has them.
    """

    network: Network
    refused: dict[fx.Node, str]
    sizes: dict[str, Sizes]


def lower_graph(
    graph: fx.Graph, root: nn.Module, recorded: Mapping[fx.Node, o.Value], sizes: Mapping[str, Sizes] | None = None
) -> Lowered:
    """The network that computes `graph`, whose modules and constants `root` holds.

    `recorded` says what each node gave on the example, `sizes` which sizes of arguments are known for every call.
    """
    return _Lowering(root, recorded, sizes or {}).run(graph.nodes)


class _Lowering:
    def __init__(self, root: nn.Module, recorded: Mapping[fx.Node, o.Value], sizes: Mapping[str, Sizes]):
        self.root, self.recorded, self.sizes = root, recorded, sizes
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.network = Network()
        self.results: dict[fx.Node, Any] = {}
        self.refused: dict[fx.Node, str] = {}

    def run(self, nodes: Iterable[fx.Node]) -> Lowered:
        for node in nodes:
            try:
                self.results[node] = self._lowered(node)
            except Unsupported as error:
                self.refused[node] = str(error)
                self.results[node] = self._unknown(node)
        sizes = {node.name: value.sizes for node, value in self.results.items() if isinstance(value, Value)}
        return Lowered(self.network, self.refused, sizes)

    def _lowered(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "output":
            return self._output(node)
        for read in node.all_input_nodes:
            if self.results[read] is _ABSENT:
                raise Unsupported(f"reads {read.name}, which a plan cannot hold")
        args = fx.map_arg(node.args, self.results.__getitem__)
        kwargs = dict(fx.map_arg(node.kwargs, self.results.__getitem__))
        if node.op == "get_attr":
            return self._constant(node)
        if node.target is OrderedDict:
            return dict(*args)
        if node.op == "call_function":
            return views.lower_function(self.network, node.name, node.target, args, kwargs)
        if node.op == "call_method":
            return views.lower_method(self.network, node.name, node.target, args, kwargs)
        module = self.modules[node.target]
        if kwargs:
            raise Unsupported("a module called with keyword arguments")
        if is_layer(module):
            return lower_layer(self.network, module, node.target, args)
        return views.lower_module(self.network, node.target, module, args)

    def _placeholder(self, node: fx.Node) -> Value:
        value = self.recorded[node]
        if value.kind != "tensor":
            raise Unsupported(f"the argument {node.target!r} is not a tensor")
        if value.dtype not in DTYPES:
            raise Unsupported(f"the argument {node.target!r} is a tensor of {value.dtype}")
        sizes = list(self.sizes.get(node.target, [None] * len(value.shape)))
        self._require(node, sizes)
        return self.network.input(node.target, value.dtype, sizes)

    def _require(self, node: fx.Node, sizes: list[int | None]) -> None:
        """Fills in the sizes that the first weighted layers fix."""
        for user in node.users:
            layer = self.modules.get(user.target) if user.op == "call_module" else None
            kind = getattr(layer, "kind", "")
            if kind in ("quantize", "lookup"):
                self._require(user, sizes)
            elif kind == "linear":
                sizes[-1] = layer.weight.shape[1 if user.args[0] is node else 0]  # else the residual
            elif kind == "conv" and user.args[0] is node:
                transposed, groups = layer.options["transposed"], layer.options["groups"]
                sizes[1] = layer.weight.shape[0] if transposed else layer.weight.shape[1] * groups

    def _constant(self, node: fx.Node) -> Value:
        tensor: Any = self.root
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.dim() > 5:
            raise Unsupported(f"the constant {node.target!r} is not a tensor of one of the dtypes of a plan")
        attributes = [self.network.tensor(tensor)]
        return self.network.step(StepKind.CONSTANT, node.target, [], attributes, tensor.dtype, tensor.shape)

    def _output(self, node: fx.Node) -> None:
        structure = self._structure(node.args[0])
        names = [value.name for value in self.network.inputs]
        self.network.metadata = {"inputs": names, "output": structure}

    def _structure(self, result: Any) -> Any:
        """What the model returns, as JSON: {"value": place in the outputs} for a tensor."""
        if isinstance(result, fx.Node):
            return self._structure(self.results[result])
        if isinstance(result, Value):
            self.network.outputs.append(result)
            return {"value": len(self.network.outputs) - 1}
        if isinstance(result, (tuple, list)):
            kind = "tuple" if isinstance(result, tuple) else "list"
            return {kind: [self._structure(r) for r in result]}
        if isinstance(result, dict) and all(isinstance(k, str) for k in result):
            return {"dict": {k: self._structure(r) for k, r in result.items()}}
        if isinstance(result, float) and not math.isfinite(result):
            raise Unsupported("the model returns a number that is not finite")
        if result is None or isinstance(result, (bool, int, float, str)):
            return {"constant": result}
        what = "a size of a tensor" if isinstance(result, Dynamic) else "something that is not a tensor"
        raise Unsupported(f"the model returns {what}")

    def _unknown(self, node: fx.Node) -> Any:
        """What stands for the result of a refused node, so that the rehearsal can go on."""
        value = self.recorded.get(node)
        if node.op == "get_attr" or value is None or value.kind != "tensor":
            return _ABSENT
        if value.dtype not in DTYPES or len(value.shape) > MAX_RANK:
            return _ABSENT
        return self.network.value(node.name, value.dtype, [None] * len(value.shape))


_ABSENT = object()
