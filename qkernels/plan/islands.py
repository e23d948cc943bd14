"""Cuts a graph into parts that a plan can run and parts that torch must: the float islands.

Every tensor gets a level: the number of changes between the two on the way to it. The parts of one level run together,
level by level. Sizes, constants and sequences of tensors are made again in every part that reads them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import inplace_methods

from qkernels.core.operations import Value
from qkernels.errors import Unsupported


@dataclass(frozen=True)
class Part:
    """A subgraph: `graph` has a placeholder for each name in `inputs` and returns the tuple of `outputs`.

    Names are those of nodes of the whole graph.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    native: bool
    recorded: Mapping[fx.Node, Value]


def cut(graph: fx.Graph, refused: Mapping[fx.Node, str], recorded: Mapping[fx.Node, Value]) -> list[Part]:
    """The parts in the order in which they run; those with refused nodes are not native."""
    return _Cutter(graph, refused, recorded).parts()


class _Cutter:
    def __init__(self, graph: fx.Graph, refused: Mapping[fx.Node, str], recorded: Mapping[fx.Node, Value]):
        self.graph, self.refused, self.recorded = graph, refused, recorded
        self.levels: dict[fx.Node, int] = {}

    def parts(self) -> list[Part]:
        for node in self.graph.nodes:
            if self._is_cut_point(node) and node.op != "placeholder":
                self.levels[node] = self._level(node)
        read = set(self._read_by(*(n for n in self.graph.nodes if n.op == "output")))
        for node in self.levels:
            read.update(source for source in self._read_by(node) if self._level_of(source) != self.levels[node])
        return [self._part(level, read) for level in sorted(set(self.levels.values()))]

    def _is_cut_point(self, node: fx.Node) -> bool:
        """Whether the node gives a tensor, which can go from part to part."""
        return node.op not in ("output", "get_attr") and self.recorded[node].kind == "tensor"

    def _level_of(self, node: fx.Node) -> int:
        return self.levels.get(node, -1)  # an argument of the model is there from the start

    def _level(self, node: fx.Node) -> int:
        """Even levels are native."""
        lowest = max([0, *map(self._level_of, self._read_by(node))])
        return lowest + (lowest % 2 != (node in self.refused))

    def _read_by(self, *nodes: fx.Node) -> list[fx.Node]:
        """The tensors that the nodes read, directly or through sizes and sequences."""
        found: dict[fx.Node, None] = {}
        pending = [n for node in nodes for n in node.all_input_nodes]
        while pending:
            node = pending.pop()
            if self._is_cut_point(node) or node.op == "placeholder":
                found[node] = None
            else:
                pending += node.all_input_nodes
        return list(found)

    def _part(self, level: int, read: set[fx.Node]) -> Part:
        mine = [node for node in self.graph.nodes if self.levels.get(node) == level]
        copy = _Copy([source for source in self._read_by(*mine) if self._level_of(source) != level], self.recorded)
        outputs = [node for node in mine if node in read]
        copy.graph.output(tuple(copy(node) for node in outputs))
        return Part(copy.graph, copy.inputs, tuple(n.name for n in outputs), level % 2 == 0, copy.recorded)

    def assembly(self, output: fx.Node) -> Part:
        copy = _Copy(self._read_by(output), self.recorded)
        copy.graph.output(fx.map_arg(output.args[0], copy))
        return Part(copy.graph, copy.inputs, (), False, copy.recorded)


class _Copy:
    """Copies nodes, and what they read, into a graph of their own, in which `sources` are the arguments."""

    def __init__(self, sources: list[fx.Node], recorded: Mapping[fx.Node, Value]):
        self.graph, self._recorded = fx.Graph(), recorded
        self.inputs = tuple(source.name for source in sources)
        self.copies = {source: self.graph.placeholder(source.name) for source in sources}
        self.recorded = {self.copies[source]: recorded[source] for source in sources}

    def __call__(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            for source in node.all_input_nodes:
                self(source)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
            self.recorded[self.copies[node]] = self._recorded[node]
        return self.copies[node]


def result_part(graph: fx.Graph, recorded: Mapping[fx.Node, Value]) -> Part:
    """What puts the results of the other parts together as the model returns them."""
    cutter = _Cutter(graph, {}, recorded)
    (output,) = (node for node in graph.nodes if node.op == "output")
    return cutter.assembly(output)


def torch_module(part: Part, root: nn.Module) -> fx.GraphModule:
    """A part that torch runs, with the modules and constants of `root` that it uses."""
    return fx.GraphModule(root, part.graph, "FloatIsland").eval()


# ---- islands that write to what they read


def refuse_overwriting(model: fx.GraphModule, arguments: tuple[Any, ...], refused: Iterable[fx.Node]) -> None:
    """Raises where torch would write in place to what others read too: native parts have memory of their own.

    The example says which nodes share memory; nothing runs if no refused node is in place.
    """
    written = {node: found for node in refused if (found := _written(node))}
    if not written:
        return
    interpreter = fx.Interpreter(model, garbage_collect_values=False)  # no memory is used twice
    with torch.no_grad():
        interpreter.run(*arguments)
    memory = {node: _memory(result) for node, result in interpreter.env.items()}
    for node, targets in written.items():
        _refuse_shared(node, targets, memory)


def _refuse_shared(node: fx.Node, targets: list[fx.Node], memory: Mapping[fx.Node, set[int]]) -> None:
    places = set().union(*(memory[target] for target in targets))
    shared = [other for other in memory if other < node and memory[other] & places]
    for source in shared:
        readers = [user for user in source.users if not (user is node or user in shared or _reads_sizes(user))]
        if readers:
            what = "the model returns" if readers[0].op == "output" else f"{readers[0].name} reads"
            raise Unsupported(
                f"compile: {node.name} writes in place to {source.name}, which {what}: use the other form"
            )
        if source.op in ("placeholder", "get_attr") and source not in targets:
            raise Unsupported(f"compile: {node.name} writes in place to a part of {source.name}: use the other form")


def _written(node: fx.Node) -> list[fx.Node]:
    """The nodes to whose results the node writes."""
    found: list[fx.Node] = []
    fx.map_arg(node.kwargs.get("out"), found.append)
    first = [*node.args, *(node.kwargs[name] for name in ("input", "self") if name in node.kwargs)][:1]
    if _is_in_place(node):
        fx.map_arg(first, found.append)
    return found


def _is_in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name in inplace_methods
    return (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True


def _memory(result: Any) -> set[int]:
    """Where the numbers of a result are: the addresses of the storages."""
    if isinstance(result, (tuple, list)):
        return set().union(*map(_memory, result))
    if not isinstance(result, Tensor) or result.layout is not torch.strided or not result.numel():
        return set()
    return {result.untyped_storage().data_ptr()}


def _reads_sizes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
