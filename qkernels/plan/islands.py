"""Cuts a graph into parts that a plan can run and parts that torch must: the float islands.

Every tensor gets a level: the number of changes between the two on the way to it. The parts of one level run together,
level by level. Sizes, constants and sequences of tensors are made again in every part that reads them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx, nn

from qkernels.core.operations import Value
from qkernels.plan.views import is_view, lays_out


@dataclass(frozen=True)
class Part:
    """A subgraph: `graph` has a placeholder for each name in `inputs` and returns the tuple of `outputs`.

    Names are those of nodes of the whole graph; `sources` says which of them each node is a copy of.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    native: bool
    recorded: Mapping[fx.Node, Value]
    sources: Mapping[fx.Node, fx.Node]


def cut(graph: fx.Graph, outside: Collection[fx.Node], recorded: Mapping[fx.Node, Value]) -> list[Part]:
    """The parts in the order in which they run; those with the nodes `outside` of a plan are not native."""
    return _Cutter(graph, outside, recorded).parts()


class _Cutter:
    def __init__(self, graph: fx.Graph, outside: Collection[fx.Node], recorded: Mapping[fx.Node, Value]):
        self.graph, self.outside, self.recorded = graph, outside, recorded
        self.levels: dict[fx.Node, int] = {}

    def parts(self) -> list[Part]:
        for node in self.graph.nodes:
            if self._is_cut_point(node) and node.op != "placeholder":
                self.levels[node] = self._level(node)
        read = set(self._read_by(*(n for n in self.graph.nodes if n.op == "output")))
        for node in self.levels:
            read.update(source for source in self._read_by(node) if self._level_of(source) != self.levels[node])
        parts = [self._part(level, read) for level in sorted(set(self.levels.values()))]
        return [part for part in parts if part.outputs or not part.native]

    def _is_cut_point(self, node: fx.Node) -> bool:
        """Whether the node gives a tensor, which can go from part to part."""
        return node.op not in ("output", "get_attr") and self.recorded[node].kind == "tensor"

    def _level_of(self, node: fx.Node) -> int:
        return self.levels.get(node, -1)  # an argument of the model is there from the start

    def _level(self, node: fx.Node) -> int:
        """Even levels are native."""
        lowest = max([0, *map(self._level_of, self._read_by(node))])
        return lowest + (lowest % 2 != (node in self.outside))

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
        return copy.part(tuple(n.name for n in outputs), level % 2 == 0)

    def assembly(self, output: fx.Node) -> Part:
        copy = _Copy(self._read_by(output), self.recorded)
        copy.graph.output(fx.map_arg(output.args[0], copy))
        return copy.part((), False)


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

    def part(self, outputs: tuple[str, ...], native: bool) -> Part:
        sources = {copy: node for node, copy in self.copies.items()}
        return Part(self.graph, self.inputs, outputs, native, self.recorded, sources)


def result_part(graph: fx.Graph, recorded: Mapping[fx.Node, Value]) -> Part:
    """What puts the results of the other parts together as the model returns them."""
    cutter = _Cutter(graph, (), recorded)
    (output,) = (node for node in graph.nodes if node.op == "output")
    return cutter.assembly(output)


def torch_module(part: Part, root: nn.Module) -> fx.GraphModule:
    """A part that torch runs, with the modules and constants of `root` that it uses."""
    return fx.GraphModule(root, part.graph, "FloatIsland").eval()


# ---- layouts that islands read

_READ, _REACHED = 2, 1
_OWN_LAYOUT = ("linear", "conv", "max_pool", "avg_pool", "adaptive_avg_pool")


def follow_layouts(
    model: fx.GraphModule, refused: dict[fx.Node, str], recorded: Mapping[fx.Node, Value]
) -> set[fx.Node]:
    """The views and copies that islands read: they belong to the islands.

    torch's float kernels give other bits for other strides. So islands must read what they read in the model: results
    of whole steps, which native parts lay out as the modules do (csrc/plan/layouts.h), through torch's own views. A
    copy whose layout goes on through steps to an island is added to `refused`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    views: set[fx.Node] = set()
    reach: dict[fx.Node, int] = {}
    for node in reversed(model.graph.nodes):
        reach[node] = max((_reach(user, reach, refused, views, modules) for user in node.users), default=0)
        if node in refused or recorded[node].kind != "tensor" or not is_view(node, modules):
            continue
        if reach[node] == _READ:
            views.add(node)
        elif reach[node] == _REACHED and lays_out(node, modules):
            refused[node] = "lays out in memory what an island reads"
    return views


def _reach(
    user: fx.Node,
    reach: Mapping[fx.Node, int],
    refused: Collection[fx.Node],
    views: Collection[fx.Node],
    modules: Mapping[str, nn.Module],
) -> int:
    """How far a layout goes through one that reads it: to an island at once, through steps, or not."""
    if user.op == "output":
        return 0
    if user in refused or user in views:
        return _READ
    if is_view(user, modules):
        return reach[user]
    layer = modules[user.target] if user.op == "call_module" else None
    if _reads_sizes(user) or getattr(layer, "kind", None) in _OWN_LAYOUT:
        return 0
    return min(reach[user], _REACHED)


def _reads_sizes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
