"""Integer layers that merge without changing a code: fewer passes over memory.

A layer offers what it can take over: `with_table`, `with_residual`, `with_padding`, each returning the merged layer.
Nothing here knows a layer by name.
"""

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from qkernels.core.graph import modules_of, replace_module
from qkernels.core.sizes import sizes_of


def merge_layers(converted: fx.GraphModule) -> None:
    """Merges zero padding, tables and additions into the linear or convolution next to them, in place.

    `converted.meta["sources"]` follows: a merged layer stands for the last operation it computes.
    """
    _Merger(converted).run()


class _Merger:
    def __init__(self, converted: fx.GraphModule):
        self.converted, self.graph = converted, converted.graph
        self.modules = modules_of(converted)
        self.sources: dict[str, str] = converted.meta["sources"]
        self.sizes = sizes_of(self.graph, self.modules)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is F.pad:
                self._padding(node)
            elif self._kind(node) == "lookup":
                self._table(node)
            elif self._kind(node) == "add":
                self._addition(node)
        self.converted.delete_all_unused_submodules()
        self.graph.lint()
        self.converted.recompile()

    def _layer(self, node: Any) -> nn.Module | None:
        return self.modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _kind(self, node: Any) -> str:
        return getattr(self._layer(node), "kind", "")

    def _can_fuse(self, node: Any) -> bool:
        """Whether the node is a layer with room in its epilogue and only one reader."""
        layer = self._layer(node)
        return hasattr(layer, "can_fuse") and layer.can_fuse() and len(node.users) == 1

    def _merge(self, kept: fx.Node, layer: nn.Module, gone: fx.Node) -> None:
        """`layer`, at the path of `kept`, now computes what `gone` did."""
        replace_module(self.converted, kept.target, layer)
        self.modules[kept.target] = layer
        self.sources[kept.target] = self.sources.pop(gone.target)
        kept.meta["source"] = self.sources[kept.target]

    def _padding(self, node: fx.Node) -> None:
        """Codes padded with the code of zero, then a convolution that pads with zeros itself."""
        if len(node.users) != 1 or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
            return
        (reader,) = node.users
        layer = self._layer(reader)
        amounts, value = node.args[1], node.kwargs.get("value", 0)
        if not hasattr(layer, "with_padding") or reader.args[0] is not node or node.kwargs.get("mode") != "constant":
            return
        merged = layer.with_padding(amounts, value)
        if merged is None:
            return
        replace_module(self.converted, reader.target, merged)
        self.modules[reader.target] = merged
        reader.replace_input_with(node, node.args[0])
        self.graph.erase_node(node)

    def _table(self, node: fx.Node) -> None:
        before, lookup = node.args[0], self._layer(node)
        if not self._can_fuse(before) or self._layer(before).out_qparams.dtype != lookup.out_qparams.dtype:
            return
        self._merge(before, self._layer(before).with_table(lookup.table, lookup.out_qparams), node)
        node.replace_all_uses_with(before)
        self.graph.erase_node(node)

    def _addition(self, node: fx.Node) -> None:
        """The operand computed last moves to the addition and takes the other one as its residual."""
        if len(node.args) != 2 or node.args[0] is node.args[1]:
            return
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        operands = [(a, 1 - i) for i, a in enumerate(node.args) if self._can_fuse(a)]
        sizes = {self.sizes.get(a) for a in node.args}
        addition = self._layer(node)
        dtypes = {grid.dtype for grid in (*addition.in_qparams, addition.out_qparams)}
        if not operands or None in sizes or len(sizes) != 1 or len(dtypes) != 1:
            return
        last, other = max(operands, key=lambda pair: order[pair[0]])
        residual = addition.in_qparams[other]
        layer = self._layer(last).with_residual(residual, addition.out_qparams, addition.options["clamp"])
        self._merge(last, layer, node)
        with self.graph.inserting_before(node):
            merged = self.graph.call_module(last.target, (last.args[0], node.args[other]))
        merged.meta.update(node.meta, source=self.sources[last.target])
        self.sizes[merged] = self.sizes[node]
        node.replace_all_uses_with(merged)
        self.graph.erase_node(node)
        self.graph.erase_node(last)
