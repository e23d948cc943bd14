"""NNI's quantizers of 2.x over the core of qkernels: `from qkernels.frontends.nni_v2 import QAT_Quantizer`.

A quantizer is made over a model, a config_list and the optimizer; `compress()` returns the model, the user trains or
calibrates it, `export_model` saves it. `convert` is what the original has not: the network in integers. The LAST entry
of a config_list that fits a module wins. See docs/frontends.md.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from qkernels.core import graph as g
from qkernels.core.attach import OUTPUT, WEIGHT, Site, as_prepared, attach, attached
from qkernels.core.convert import convert as core_convert
from qkernels.core.phases import observe, settle
from qkernels.core.prepare import quantizers
from qkernels.core.qspec import QSpec
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported
from qkernels.frontends.common import close_matches, keep_containers

TYPES = ("weight", "input", "output")
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")
DTYPES = ("int", "uint")
KEYS = (
    "quant_types",
    "quant_bits",
    "quant_start_step",
    "quant_dtype",
    "quant_scheme",
    "op_types",
    "op_names",
    "exclude",
)


# Scheme and dtype by the type of tensor, for entries that say nothing.
_defaults = dict.fromkeys(TYPES, ("per_tensor_affine", "uint"))


def set_quant_scheme_dtype(quant_type: str, new_scheme: str, new_dtype: str) -> None:
    """Changes scheme and dtype of "weight", "input" or "output" for quantizers made from now on."""
    _one_of("set_quant_scheme_dtype: quant_type", quant_type, TYPES)
    _one_of("set_quant_scheme_dtype: new_scheme", new_scheme, SCHEMES)
    _one_of("set_quant_scheme_dtype: new_dtype", new_dtype, DTYPES)
    _defaults[quant_type] = new_scheme, new_dtype


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{what}: must be one of {list(known)}, got {value!r}")


@dataclass(frozen=True)
class _Entry:
    """What one module gets: bits, scheme and dtype by the type of tensor."""

    bits: Mapping[str, int]
    scheme: Mapping[str, str] = field(default_factory=dict)
    dtype: Mapping[str, str] = field(default_factory=dict)
    start_step: int = 0


def _parse(model: nn.Module, config_list: Any, kinds: tuple[str, ...]) -> dict[str, _Entry]:
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise InvalidArgument(f"config_list: must be a list of dicts, got {config_list!r}")
    modules = {path: m for path, m in model.named_modules() if path}
    found: dict[str, _Entry | None] = {}
    for i, entry in enumerate(config_list):
        where = f"config_list[{i}]"
        if not isinstance(entry, Mapping):
            raise InvalidArgument(f"{where}: must be a dict, got {entry!r}")
        for key in entry:
            if key not in KEYS:
                raise InvalidArgument(f"{where}.{key}: unknown key{close_matches(key, KEYS)}")
        chosen = _selected(modules, entry, where)
        parsed = None if entry.get("exclude") else _entry(entry, where, kinds)
        for path in chosen:
            found.pop(path, None)
            found[path] = parsed
    return {path: entry for path, entry in found.items() if entry is not None}


def _selected(modules: Mapping[str, nn.Module], entry: Mapping[str, Any], where: str) -> list[str]:
    if "op_names" not in entry and "op_types" not in entry:
        raise InvalidArgument(f"{where}: needs op_types or op_names")
    for name in entry.get("op_names", ()):
        if name not in modules:
            raise InvalidArgument(f"{where}.op_names: the model has no module {name!r}{close_matches(name, modules)}")
    types = set(entry.get("op_types", ()))
    known = {type(m).__name__ for m in modules.values()} | {cls.__name__ for cls in WEIGHTED} | {"default", "ReLU6"}
    for name in types - known:
        raise InvalidArgument(f"{where}.op_types: no module is a {name!r}{close_matches(name, known)}")
    if "default" in types:
        types |= {cls.__name__ for cls in WEIGHTED}
    return [
        path
        for path, m in modules.items()
        if ("op_names" not in entry or path in entry["op_names"]) and (not types or type(m).__name__ in types)
    ]


def _entry(entry: Mapping[str, Any], where: str, kinds: tuple[str, ...]) -> _Entry:
    types = entry.get("quant_types", ("weight",))
    for kind in types:
        _one_of(f"{where}.quant_types", kind, kinds)
    bits = entry.get("quant_bits", 8)
    widths = dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(types, bits)
    for kind in types:
        if kind not in widths:
            raise InvalidArgument(f"{where}.quant_bits: says nothing about {kind!r}, got {bits!r}")
        width = widths[kind]
        if not isinstance(width, int) or not 0 < width < 32:
            raise InvalidArgument(f"{where}.quant_bits.{kind}: must be an integer from 1 to 31, got {width!r}")
        if width > 8:
            raise Unsupported(f"{where}.quant_bits.{kind}: {width}: there are kernels for at most 8 bits")
    start = entry.get("quant_start_step", 0)
    if not isinstance(start, int) or start < 0:
        raise InvalidArgument(f"{where}.quant_start_step: must be at least 0, got {start!r}")

    def by_kind(key: str, known: tuple[str, ...], default: int) -> dict[str, str]:
        given = entry.get(key, {})
        given = given if isinstance(given, Mapping) else dict.fromkeys(types, given)
        for kind, value in given.items():
            _one_of(f"{where}.{key}.{kind}", value, known)
        return {kind: given.get(kind, _defaults[kind][default]) for kind in types}

    return _Entry(
        {kind: widths[kind] for kind in types},
        by_kind("quant_scheme", SCHEMES, 0),
        by_kind("quant_dtype", DTYPES, 1),
        start,
    )


class _Quantizer:
    """Rounds what the config_list names, in place; a model is the same object before and after.

    Args:
        model: a float model.
        config_list: entries with `quant_types`, `quant_bits`, `op_types`, `op_names`, ...; None: all weights.
        optimizer: the user's; learned scales are added to it.
        dummy_input: arguments of the model. With it, a BatchNorm right behind a convolution is trained as a part of it.
    """

    kinds: ClassVar[tuple[str, ...]] = TYPES
    trained: ClassVar[bool] = True
    rule: ClassVar[str] = "ste"
    default: ClassVar[dict[str, Any]] = {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]}

    def __init__(
        self,
        model: nn.Module,
        config_list: Iterable[Mapping[str, Any]] | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: Any = None,
    ):
        if self.trained and not isinstance(optimizer, Optimizer):
            raise InvalidType(f"{type(self).__name__}: optimizer must be a torch optimizer, got {optimizer!r}")
        self.bound_model, self.optimizer, self.dummy_input = model, optimizer, dummy_input
        self.entries = _parse(model, [self.default] if config_list is None else config_list, self.kinds)
        norms = {} if dummy_input is None else _norms(model, dummy_input)
        sites = {path: self._site(path, entry, norms.get(path)) for path, entry in self.entries.items()}
        self.originals = attach(model, sites, self.trained)
        self.exported = False

    def _site(self, path: str, entry: _Entry, norm: str | None) -> Site:
        recipes = {kind: self._recipe(entry, kind) for kind in entry.bits}
        weighted = isinstance(self.bound_model.get_submodule(path), WEIGHTED)
        inputs = {0: recipes["input"]} if "input" in recipes else {}
        weight = recipes.get("weight") if weighted else None
        return Site(inputs, recipes.get("output"), weight, norm if weight else None, None, entry.start_step)

    def _recipe(self, entry: _Entry, kind: str) -> TensorRecipe:
        observer = "minmax" if kind == "weight" else "moving_average"
        return TensorRecipe(self._spec(entry, kind), observer, rule=self.rule)

    def _spec(self, entry: _Entry, kind: str) -> QSpec:
        """Unsigned weights lie on the same grid with codes moved down by the half: kernels take int8."""
        half, scheme = 2 ** (entry.bits[kind] - 1), entry.scheme[kind]
        if entry.bits[kind] == 1:
            raise Unsupported("quant_bits: 1: use BNNQuantizer")
        if scheme.startswith("per_channel") and kind != "weight":
            raise Unsupported(f"quant_scheme: {scheme} for {kind}s: no integer layer computes with it; use per_tensor")
        where = scheme.endswith("symmetric"), scheme.startswith("per_channel")
        if entry.dtype[kind] == "int":
            return QSpec(torch.int8, 1 - half, half - 1, *where)
        if kind == "weight":
            return QSpec(torch.int8, -half, half - 1, *where)
        return QSpec(torch.uint8, 0, 2 * half - 1, *where)

    def compress(self) -> nn.Module:
        """The model, ready to train; learned scales join the optimizer."""
        if self.optimizer is not None:
            known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            new = [p for q in quantizers(self.bound_model) for p in q.parameters() if id(p) not in known]
            if new:
                self.optimizer.add_param_group({"params": new})
        return self.bound_model

    def prepared(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The network as `qkernels.prepare` gives it, for `exact`, `verify` and `compare`."""
        if self.exported:
            raise InvalidState("convert: export_model has taken the quantizers off; convert first")
        if not args and not kwargs:
            if self.dummy_input is None:
                raise InvalidArgument("convert: give an input of the model, convert(x)")
            args, kwargs = g.arguments(self.dummy_input)
        return as_prepared(self.bound_model, args, kwargs)

    def convert(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The int8 network; arguments of the model are needed if there was no dummy_input."""
        return keep_containers(core_convert(self.prepared(*args, **kwargs)), self.bound_model)

    def export_model(
        self,
        model_path: str,
        calibration_path: str | None = None,
        onnx_path: str | None = None,
        input_shape: tuple[int, ...] | None = None,
        device: Any = None,
    ) -> dict[str, dict[str, Any]]:
        """Takes the quantizers off, saves the float state_dict and the calibration config, and returns the latter."""
        if onnx_path is not None and input_shape is None:
            raise InvalidArgument("export_model: onnx_path needs input_shape")
        calibration: dict[str, dict[str, Any]] = {path: {} for path in self.entries}
        for path, key, quantizer in attached(self.bound_model):
            kind = {WEIGHT: "weight", OUTPUT: "output"}.get(key, "input")
            calibration[path] |= {f"{kind}_bits": self.entries[path].bits[kind], **self._calibration(kind, quantizer)}
        self.originals.restore()
        self.exported = True
        _save(lambda path: torch.save(self.bound_model.state_dict(), path), model_path)
        if calibration_path is not None:
            _save(lambda path: torch.save(calibration, path), calibration_path)
        if onnx_path is not None:
            x = torch.zeros(input_shape, device=device)
            model = self.bound_model.to(device).eval()
            _save(lambda path: torch.onnx.export(model, (x,), path, dynamo=False), onnx_path)
        return calibration

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        return {}


def _norms(model: nn.Module, dummy_input: Any) -> dict[str, str]:
    """The path of the BatchNorm that directly follows a convolution, by the path of the convolution."""
    training = model.training
    traced = g.trace(model.eval(), *g.arguments(dummy_input))
    model.train(training)
    modules, found = g.modules_of(traced), {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.modules.batchnorm._BatchNorm):
            before = node.args[0]
            layer = modules.get(before.target) if before.op == "call_module" else None
            if isinstance(layer, WEIGHTED[:-1]) and len(before.users) == 1:
                found[before.meta["path"]] = node.meta["path"]
    return found


def _save(write: Any, path: str) -> None:
    """Writes beside `path` and moves into place, so that a file is there in whole or not at all."""
    partial = f"{path}.partial"
    write(partial)
    os.replace(partial, path)


class NaiveQuantizer(_Quantizer):
    """Weights to 8 bits at once."""

    kinds = ("weight",)
    trained = False

    def _spec(self, entry: _Entry, kind: str) -> QSpec:
        return QSpec.weight(entry.bits[kind], per_channel=False)

    def compress(self) -> nn.Module:
        observe(self.bound_model)
        settle(self.bound_model)
        return self.bound_model


class QAT_Quantizer(_Quantizer):
    """Straight-through training; weights on the range of now, activations on moving averages. Jacob et al. 2018."""

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        if kind == "weight":
            grid, entry = quantizer.qparams(), self.entries[quantizer.source.removesuffix(".weight")]
            shift = 0 if entry.dtype[kind] == "int" else 2 ** (entry.bits[kind] - 1)
            rank = self.bound_model.get_submodule(quantizer.source.removesuffix(".weight")).weight.dim()
            shape = (1,) if grid.axis is None else (-1, *[1] * (rank - 1))
            zero_point = (grid.zero_point.float() + shift).reshape(shape)
            return {"weight_scale": grid.scale.reshape(shape), "weight_zero_point": zero_point}
        low, high = quantizer.observer.low.item(), quantizer.observer.high.item()
        return {f"tracked_min_{kind}": low, f"tracked_max_{kind}": high}


class LsqQuantizer(_Quantizer):
    """Learned step sizes. Esser et al. 2020."""

    rule = "lsq"

    def _spec(self, entry: _Entry, kind: str) -> QSpec:
        half = 2 ** (entry.bits[kind] - 1)
        return QSpec(torch.int8, -half, half - 1, symmetric=True)

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        if kind == "weight":
            return {}
        high = quantizer.qparams().scale * quantizer.spec.qmax
        return {f"tracked_min_{kind}": -high.item(), f"tracked_max_{kind}": high.item()}


class DoReFaQuantizer(_Quantizer):
    """Weights through tanh, inputs and outputs clipped to [0, 1]. Zhou et al. 2016."""

    rule = "dorefa"

    def _spec(self, entry: _Entry, kind: str) -> QSpec:
        bits = entry.bits[kind]
        return QSpec.weight(bits, per_channel=False) if kind == "weight" else QSpec.activation(bits)


class BNNQuantizer(_Quantizer):
    """Signs. Courbariaux et al. 2016. Weights are kept in [-1, 1] after each step of the optimizer."""

    rule = "bnn"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.optimizer.register_step_post_hook(self._clip)

    def _spec(self, entry: _Entry, kind: str) -> QSpec:
        return QSpec(torch.int8, -1, 1, symmetric=True)

    @torch.no_grad()
    def _clip(self, *_: Any) -> None:
        for path, entry in self.entries.items():
            if "weight" in entry.bits:
                self.bound_model.get_submodule(path).weight.clamp_(-1.0, 1.0)


class ObserverQuantizer(_Quantizer):
    """Watches all data until `compress()`, which chooses grids: weights by extremes, activations by histograms."""

    trained = False

    def __init__(self, model: nn.Module, config_list: Iterable[Mapping[str, Any]], *args: Any, **kwargs: Any):
        if model.training:
            raise InvalidState("ObserverQuantizer: the model must be in eval mode; call model.eval() first")
        super().__init__(model, config_list, *args, **kwargs)
        for path, entry in self.entries.items():
            for kind, bits in entry.bits.items():
                if bits != 8:
                    raise Unsupported(f"ObserverQuantizer: {path}: {kind}: 8 bits only, got {bits}")
        observe(model)

    def _recipe(self, entry: _Entry, kind: str) -> TensorRecipe:
        if kind == "weight":
            return TensorRecipe(QSpec.weight(per_channel=False))
        return TensorRecipe(QSpec(torch.uint8, 0, 127), "histogram", (("codes", 256),))

    def compress(self) -> nn.Module:
        settle(self.bound_model)
        return self.bound_model

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        low, high = quantizer.observer.range()
        ends = {f"tracked_max_{kind}": high.max().item(), f"tracked_min_{kind}": low.min().item()}
        spec = quantizer.spec
        return ends | {f"tracked_qmin_{kind}": spec.qmin, f"tracked_qmax_{kind}": spec.qmax}
