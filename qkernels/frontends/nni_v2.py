"""NNI's quantizers of 2.x over the core of qkernels: `from qkernels.frontends.nni_v2 import QAT_Quantizer`.

A quantizer is made over a model, a config_list and the optimizer; `compress()` returns the model, the user trains or
calibrates it, `export_model` saves it. `convert` is what the original has not: the network in integers. The LAST entry
of a config_list that fits a module wins. See docs/frontends.md.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from qkernels.core.attach import OUTPUT, WEIGHT, Site
from qkernels.core.attached import Attached, Holder, check_trains, norms_to_fold
from qkernels.core.files import write_atomically
from qkernels.core.grids import Grid
from qkernels.core.qspec import MAX_BITS, QParams, QSpec
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported, close_matches
from qkernels.frontends.common import WEIGHTED, check_keys, check_one_of, check_words, with_names, with_types

TYPES = ("weight", "input", "output")
SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")
DTYPES = ("int", "uint")
KEYS = ("quant_types", "quant_bits", "quant_start_step", "op_types", "op_names", "exclude")
KINDS_OF_GRIDS = ("quant_dtype", "quant_scheme")  # only where the quantizer leaves them open

# Scheme and dtype by the type of tensor, for entries that say nothing.
_defaults = dict.fromkeys(TYPES, ("per_tensor_affine", "uint"))


def set_quant_scheme_dtype(quant_type: str, new_scheme: str | None = None, new_dtype: str | None = None) -> None:
    """Changes scheme or dtype (None: as it was) of "weight", "input" or "output" for quantizers made from now on."""
    check_one_of(quant_type, TYPES, "set_quant_scheme_dtype: quant_type")
    old_scheme, old_dtype = _defaults[quant_type]
    scheme, dtype = old_scheme if new_scheme is None else new_scheme, old_dtype if new_dtype is None else new_dtype
    check_one_of(scheme, SCHEMES, "set_quant_scheme_dtype: new_scheme")
    check_one_of(dtype, DTYPES, "set_quant_scheme_dtype: new_dtype")
    _defaults[quant_type] = scheme, dtype


@dataclass(frozen=True)
class _Tensor:
    """What an entry says about one kind of tensor."""

    bits: int
    scheme: str
    dtype: str
    where: str  # the bits stand in the config_list


@dataclass(frozen=True)
class _Entry:
    """What one module gets."""

    tensors: Mapping[str, _Tensor]
    start_step: int


def _parse(model: nn.Module, config_list: Any, kinds: tuple[str, ...], keys: tuple[str, ...]) -> dict[str, _Entry]:
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise InvalidArgument(f"config_list: must be a list of dicts, got {config_list!r}")
    modules = {path: m for path, m in model.named_modules(remove_duplicate=False) if path}
    found: dict[str, _Entry | None] = {}
    for i, entry in enumerate(config_list):
        where = f"config_list[{i}]"
        check_keys(entry, keys, where)
        check_one_of(entry.get("exclude", False), (True, False), f"{where}.exclude")
        parsed = None if entry.get("exclude") else _entry(entry, where, kinds)
        chosen = _selected(modules, entry, where)
        for path in chosen if parsed is not None and parsed.tensors.keys() <= {"weight"} else ():
            if not isinstance(modules[path], WEIGHTED):
                raise InvalidArgument(f"{where}.quant_types: {path} is a {type(modules[path]).__name__} without weight")
        found |= {path: parsed for path in modules if path in chosen}
    if not any(found.values()):
        raise InvalidArgument("config_list: no module is left to quantize")
    return {path: entry for path, entry in found.items() if entry is not None}


def _selected(modules: Mapping[str, nn.Module], entry: Mapping[str, Any], where: str) -> set[str]:
    if "op_names" not in entry and "op_types" not in entry:
        raise InvalidArgument(f"{where}: needs op_types or op_names")
    chosen = with_names(modules, entry.get("op_names", list(modules)), f"{where}.op_names")
    if "op_types" in entry:
        chosen &= with_types(modules, entry["op_types"], (*WEIGHTED, nn.ReLU, nn.ReLU6), f"{where}.op_types")
    if not chosen:
        raise InvalidArgument(f"{where}: selects no module of the model")
    return chosen


def _entry(entry: Mapping[str, Any], where: str, kinds: tuple[str, ...]) -> _Entry:
    start = entry.get("quant_start_step", 0)
    if not isinstance(start, int) or start < 0:
        raise InvalidArgument(f"{where}.quant_start_step: must be at least 0, got {start!r}")

    def said(key: str, kind: str, default: Any) -> Any:
        given = entry.get(key, default)
        if not isinstance(given, Mapping):
            return given
        check_keys(given, TYPES, f"{where}.{key}")
        return given.get(kind, default)

    tensors, types = {}, entry.get("quant_types", ("weight",))
    check_words(types, f"{where}.quant_types")
    for kind in types:
        check_one_of(kind, kinds, f"{where}.quant_types")
        scheme, dtype = (said(key, kind, _defaults[kind][i]) for i, key in enumerate(("quant_scheme", "quant_dtype")))
        check_one_of(scheme, SCHEMES, f"{where}.quant_scheme.{kind}")
        check_one_of(dtype, DTYPES, f"{where}.quant_dtype.{kind}")
        bits, here = said("quant_bits", kind, None if "quant_bits" in entry else 8), f"{where}.quant_bits.{kind}"
        if not isinstance(bits, int) or not 0 < bits < 32:
            raise InvalidArgument(f"{here}: must be an integer from 1 to 31, got {bits!r}")
        if bits > MAX_BITS:
            raise Unsupported(f"{here}: {bits}: there are grids of at most {MAX_BITS} bits")
        tensors[kind] = _Tensor(bits, scheme, dtype, here)
    return _Entry(tensors, start)


class _Quantizer(Holder):
    """Rounds what the config_list names, in place; a model is the same object before and after.

    Args:
        model: a float model.
        config_list: entries with `quant_types`, `quant_bits`, `op_types`, `op_names`, ...; None: all weights.
        optimizer: the user's; learned scales are added to it.
        dummy_input: arguments of the model. With it, a BatchNorm right behind a convolution is trained as a part of it.
    """

    kinds: ClassVar[tuple[str, ...]] = TYPES
    keys: ClassVar[tuple[str, ...]] = KEYS
    trained: ClassVar[bool] = True
    rule: ClassVar[str] = "ste"
    rule_options: ClassVar[tuple[tuple[str, Any], ...]] = ()
    folds: ClassVar[bool] = False  # batch norms, with dummy_input
    exports_rounded: ClassVar[bool] = False  # weights in export_model
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
        self.optimizer = optimizer
        config_list = [self.default] if config_list is None else config_list
        self.entries = _parse(model, config_list, self.kinds, self.keys)
        if self.trained:
            check_trains([optimizer], model)
        norms = norms_to_fold(model, dummy_input) if self.folds and dummy_input is not None else {}
        sites = {
            path: self._site(model.get_submodule(path), entry, norms.get(path)) for path, entry in self.entries.items()
        }
        self.attached = Attached(model, sites, self.trained, dummy_input)
        if self.trained:
            self.attached.learn([optimizer])

    def _site(self, module: nn.Module, entry: _Entry, norm: str | None) -> Site:
        recipes = {kind: self._recipe(tensor, kind) for kind, tensor in entry.tensors.items()}
        inputs = {0: recipes["input"]} if "input" in recipes else {}
        weight = recipes.get("weight") if isinstance(module, WEIGHTED) else None
        grids = inputs, recipes.get("output"), weight
        return Site(*grids, norm if weight else None, folds=True, start_step=max(entry.start_step - 1, 0))

    def _recipe(self, tensor: _Tensor, kind: str) -> TensorRecipe:
        if tensor.bits == 1 and self.rule != "bnn":
            raise Unsupported(f"{tensor.where}: 1: use BNNQuantizer")
        observer = "minmax" if kind == "weight" else "moving_average"
        return TensorRecipe(self._spec(tensor, kind), observer, (), self.rule, self.rule_options)

    def _spec(self, tensor: _Tensor, kind: str) -> QSpec:
        scheme, is_weight = tensor.scheme, kind == "weight"
        wanted = {"symmetric": scheme.endswith("symmetric"), "per_channel": scheme.startswith("per_channel")}
        if wanted["per_channel"] and not is_weight:
            wanted["block"] = (-1, 1, 0)
        return QSpec.even(tensor.bits, tensor.dtype == "int", is_weight, **wanted)

    def compress(self) -> nn.Module:
        """The model, ready to train; without training, on its grids."""
        if not self.trained:
            self.attached.settle()
        return self.bound_model

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
        self.attached.settle()
        calibration: dict[str, dict[str, Any]] = {path: {} for path in self.entries}
        for path, key, quantizer in self.attached:
            bits = {f"{_kind(key)}_bits": self.entries[path].tensors[_kind(key)].bits}
            calibration[path] |= {**bits, **self._calibration(_kind(key), quantizer)}
        weights = [path for path, key, _ in self.attached if key == WEIGHT and self.exports_rounded]
        rounded = {path: self.bound_model.get_submodule(path).quantized_weight() for path in weights}
        self.attached.restore()
        for path, weight in rounded.items():
            self.bound_model.get_submodule(path).weight.data.copy_(weight)
        _save(model_path, self.bound_model.state_dict())
        if calibration_path is not None:
            _save(calibration_path, calibration)
        if onnx_path is not None:
            x, file = torch.zeros(input_shape, device=device), io.BytesIO()
            torch.onnx.export(self.bound_model.to(device).eval(), (x,), file, dynamo=False)
            write_atomically(Path(onnx_path), file.getvalue())
        return calibration

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        return {}


def _kind(key: str) -> str:
    return {WEIGHT: "weight", OUTPUT: "output"}.get(key, "input")


def _save(path: str, content: Any) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(Path(path), file.getvalue())


class NaiveQuantizer(_Quantizer):
    """Weights to 8 bits at once."""

    kinds = ("weight",)
    trained = False

    def _spec(self, tensor: _Tensor, kind: str) -> QSpec:
        return QSpec.weight(tensor.bits, per_channel=False)


class _Folding(_Quantizer):
    keys = (*KEYS, *KINDS_OF_GRIDS)  # of no effect on LSQ, as in the original
    folds = True

    def load_calibration_config(self, calibration_config: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the ranges of inputs and outputs from what `export_model` gave; training goes on from there."""
        paths = {path for path, _, _ in self.attached}
        for path in calibration_config.keys() - paths:
            raise InvalidArgument(f"calibration_config: nothing is quantized at {path!r}{close_matches(path, paths)}")
        for path, key, quantizer in self.attached:
            kind, entry = _kind(key), calibration_config.get(path, {})
            bits = self.entries[path].tensors[kind].bits
            check_one_of(entry.get(f"{kind}_bits"), [bits], f"calibration_config.{path}.{kind}_bits")
            for end in ("min", "max") if kind != "weight" else ():
                if f"tracked_{end}_{kind}" not in entry:
                    raise InvalidArgument(f"calibration_config.{path}.tracked_{end}_{kind}: missing; got {list(entry)}")
            if kind != "weight":
                self._load(quantizer, *(torch.as_tensor(entry[f"tracked_{end}_{kind}"]) for end in ("min", "max")))

    def _load(self, quantizer: Quantizer, low: torch.Tensor, high: torch.Tensor) -> None:
        raise NotImplementedError


class QAT_Quantizer(_Folding):
    """Straight-through training; weights on the range of now, activations on moving averages. Jacob et al. 2018."""

    def _load(self, quantizer: Quantizer, low: torch.Tensor, high: torch.Tensor) -> None:
        quantizer.take_range(low, high)

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        if kind == "weight":
            grid, layer = Grid.of(quantizer), quantizer.source.removesuffix(".weight")
            rank = self.bound_model.get_submodule(layer).weight.dim()
            shape = (-1, *[1] * (rank - 1)) if grid.per_channel else (1,)
            zero_point = (grid.lowest - torch.tensor(grid.offset)).float().reshape(shape)
            return {"weight_scale": torch.tensor(grid.scale).reshape(shape), "weight_zero_point": zero_point}
        low, high = quantizer.observer.low, quantizer.observer.high
        if not quantizer.observer.has_data():
            low, high = torch.zeros_like(low), torch.zeros_like(high)  # as the original says
        if quantizer.blocks is not None:
            return {
                f"tracked_min_{kind}": low.reshape(quantizer.blocks),
                f"tracked_max_{kind}": high.reshape(quantizer.blocks),
            }
        return {f"tracked_min_{kind}": low.item(), f"tracked_max_{kind}": high.item()}


class LsqQuantizer(_Folding):
    """Learned step sizes. Esser et al. 2020."""

    rule = "lsq"
    rule_options = (("init", "mean"), ("plain", True))

    def _load(self, quantizer: Quantizer, low: torch.Tensor, high: torch.Tensor) -> None:
        spec = quantizer.spec
        quantizer.set_qparams(QParams.per_tensor(float(high) / spec.qmax, 0, spec.qmin, spec.qmax, spec.dtype))

    def _spec(self, tensor: _Tensor, kind: str) -> QSpec:
        return QSpec.activation(tensor.bits, torch.int8, symmetric=True)

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        if kind == "weight":
            return {}
        # As the original says of what was never called: 0.
        high = quantizer.qparams().scale * quantizer.spec.qmax if quantizer.has_grid() else torch.zeros(())
        return {f"tracked_min_{kind}": -high.item(), f"tracked_max_{kind}": high.item()}


class DoReFaQuantizer(_Quantizer):
    """Weights through tanh, inputs and outputs clipped to [0, 1]. Zhou et al. 2016."""

    rule = "dorefa"
    exports_rounded = True

    def _spec(self, tensor: _Tensor, kind: str) -> QSpec:
        return QSpec.weight(tensor.bits, per_channel=False) if kind == "weight" else QSpec.activation(tensor.bits)


class BNNQuantizer(_Quantizer):
    """Signs. Courbariaux et al. 2016. Weights are kept in [-1, 1] after each step of the optimizer."""

    rule = "bnn"
    exports_rounded = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.attached.after_step(self.optimizer, self.attached.limit_parameters)

    def _spec(self, tensor: _Tensor, kind: str) -> QSpec:
        return QSpec(torch.int8, -1, 1, symmetric=True)


class ObserverQuantizer(_Quantizer):
    """Watches all data until `compress()`, which chooses grids: weights by extremes, activations by histograms."""

    trained = False
    exports_rounded = True

    def __init__(self, model: nn.Module, config_list: Iterable[Mapping[str, Any]], *args: Any, **kwargs: Any):
        if model.training:
            raise InvalidState("ObserverQuantizer: the model must be in eval mode; call model.eval() first")
        super().__init__(model, config_list, *args, **kwargs)

    def _recipe(self, tensor: _Tensor, kind: str) -> TensorRecipe:
        if tensor.bits != 8:
            raise Unsupported(f"{tensor.where}: ObserverQuantizer has 8 bits only, got {tensor.bits}")
        if kind == "weight":
            return TensorRecipe(QSpec.weight(per_channel=False))
        return TensorRecipe(QSpec(torch.uint8, 0, 127), "histogram", (("codes", 256),))

    def _calibration(self, kind: str, quantizer: Quantizer) -> dict[str, Any]:
        grid = quantizer.qparams()
        low, high = ((end - grid.zero_point) * grid.scale for end in (grid.qmin, grid.qmax))
        ends = {f"tracked_max_{kind}": high.item(), f"tracked_min_{kind}": low.item()}
        return ends | {f"tracked_qmin_{kind}": grid.qmin, f"tracked_qmax_{kind}": grid.qmax}
