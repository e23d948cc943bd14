"""The numbers of the converted model in the forward of one that is trained, with the gradients of the simulation.

Once nothing moves a grid any more (and batch norms are frozen), what the integer kernels will compute is known. An
`ExactUnit` stands before the Quantizer that ends an operation, computes it on integers, and hands the result to the
Quantizer, which returns it in place of the simulated one. Both differ where a tie is rounded, and in the functions that
integers compute by table.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.core import operations as o
from qkernels.core.graph import modules_of
from qkernels.core.layers import Prepared
from qkernels.core.lowering import Clamp, LoweringUnit, lower
from qkernels.core.operations import Value
from qkernels.core.placement import unit_of
from qkernels.core.prepare import PreparedModel
from qkernels.core.quantizer import Limits, Quantizer

UNITS = "exact_units"
Source = tuple[Quantizer, bool]  # where a tensor got onto its grid, and whether a dropout takes it off it in training


def link(part: PreparedModel) -> None:
    """Tells each weighted layer where its input got onto a grid, and puts an ExactUnit before each Quantizer that ends
    an operation on integers.
    """
    modules = modules_of(part)
    for node in list(part.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, Prepared) and module.has_integer_form():
            module.source = source_of(node.args[0], modules)
            reads = modules.get(node.args[0].target) if node.args[0].op == "call_module" else None
            if isinstance(reads, Quantizer):
                reads.gives_codes = not reads.spec.per_channel
            module.reader = _reader_of(node, modules)
        elif isinstance(module, Quantizer):
            _put_unit(part, node, module, modules)
    part.graph.lint()
    part.recompile()


def _reader_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Quantizer, Limits, bool] | None:
    """The Quantizer that alone reads the value of `node`, the clamp that it applies first, and whether it joins it to
    what it saw before.
    """
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    module = modules.get(reader.target) if reader.op == "call_module" else None
    if not isinstance(module, Quantizer) or reader.args[0] is not node:
        return None
    return module, reader.kwargs.get("clamp"), reader.kwargs.get("joined", False)


def source_of(node: fx.Node, modules: dict[str, nn.Module]) -> Source | None:
    """The Quantizer whose grid the values of `node` lie on."""
    module = modules.get(node.target) if node.op == "call_module" else None
    if isinstance(module, Quantizer):
        return module, False
    op = o.operation(node, modules)
    if op is None or op.kind not in o.SAME_GRID | {o.PASS, o.PAD, o.DROPOUT, "cat"}:
        return None
    found = source_of(op.inputs[0], modules)
    return None if found is None else (found[0], found[1] or op.kind == o.DROPOUT)


def _put_unit(part: PreparedModel, node: fx.Node, target: Quantizer, modules: dict[str, nn.Module]) -> None:
    value = node.args[0]
    source = source_of(value, modules)
    if source is not None:
        inputs, template = (value,), LoweringUnit("requantize", (), None)
    else:
        op, clamp = o.operation(value, modules), None
        if "clamp" in node.kwargs:
            clamp = Clamp(*node.kwargs["clamp"])
        if op is None or not value.meta.get("integer") or (target.rule is not None and target.rule.is_sign):
            return
        inputs, template = op.inputs, unit_of(value, op, (), None, clamp, stand_in=True)
    sources = tuple(source_of(n, modules) for n in inputs)
    if any(s is None or s[0].rule.is_sign for s in sources):
        return
    path = f"{UNITS}.{node.name}"
    part.add_submodule(path, ExactUnit(template, sources, target))
    with part.graph.inserting_before(node):
        unit = part.graph.call_module(path, tuple(inputs))
    unit.meta = {**node.meta, "value": Value("other"), "integer": False}
    node.args = (node.args[0], unit)


class ExactUnit(nn.Module):
    """One operation on integers: takes its float inputs, which lie on grids, and gives the float form of its codes.

    Gives None while they are not what `convert` would compute: a grid still moves, or batch statistics are used.
    """

    def __init__(self, template: LoweringUnit, sources: tuple[Source, ...], target: Quantizer):
        super().__init__()
        # In tuples, so that they do not become children a second time.
        self.template, self.sources, self.target = template, sources, (target,)
        self._made: tuple[Any, list[Tensor], nn.Module] | None = None

    def forward(self, *inputs: Tensor) -> Tensor | None:
        if not self.is_exact(inputs):
            return None
        with torch.no_grad():
            codes = [source.codes(x) for (source, _), x in zip(self.sources, inputs, strict=True)]
            layer = self.layer()
            y = layer(codes) if self.template.kind == "cat" else layer(*codes)
            return self.target[0].qparams().dequantize(y)

    def is_exact(self, inputs: tuple[Tensor, ...]) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
            return False
        if any(not x.is_cpu or x.numel() == 0 for x in inputs):
            return False
        target, weighted = self.target[0], self.template.module
        if target.follows or not target.rounds:
            return False
        if any(not source.rounded or (dropped and self.training) for source, dropped in self.sources):
            return False
        if not isinstance(weighted, Prepared):
            return True
        return weighted.quantizers["weight"].rounds and (weighted.norm is None or not weighted.norm.live)

    def layer(self) -> nn.Module:
        """The integer layer, made again when something that it is made of has changed."""
        weighted = self.template.module if isinstance(self.template.module, Prepared) else None
        grids = tuple(q.numbers() for q in (*(source for source, _ in self.sources), *self.target))
        tensors = [] if weighted is None else [*weighted.parameters(), *weighted.buffers()]
        if self._made is None or self._made[0] != grids or not _are_equal(self._made[1], tensors):
            inputs, output = tuple(source.qparams() for source, _ in self.sources), self.target[0].qparams()
            unit = replace(self.template, inputs=inputs, output=output)
            if weighted is not None:
                weight, bias, grid = weighted.canonical()
                unit = replace(unit, weight=weight, bias=bias, weight_qparams=grid)
            self._made = grids, [tensor.clone() for tensor in tensors], lower(unit)
        return self._made[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def _are_equal(known: list[Tensor], tensors: list[Tensor]) -> bool:
    """By their numbers: no version counts an edit through `.data`, and other tensors may come in their place."""
    return len(known) == len(tensors) and all(map(torch.equal, known, tensors))
