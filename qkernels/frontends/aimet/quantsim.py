"""QuantizationSimModel: a model with quantizers, its encodings, and its integer network."""

import copy
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qkernels import __version__
from qkernels.core import operations as o
from qkernels.core.attach import BIAS, OUTPUT, PARAMETERS, WEIGHT
from qkernels.core.convert import convert
from qkernels.core.functional import Concat, Functional
from qkernels.core.fusion import foldable
from qkernels.core.graph import arguments, modules_of
from qkernels.core.grids import Grid, Grids
from qkernels.core.layers import PREPARED
from qkernels.core.neighbours import inside_chains, places_around, tensor_arguments
from qkernels.core.onnx_names import places_in, scope_of
from qkernels.core.phases import evaluating
from qkernels.core.placed import Places, prepare_placed
from qkernels.core.recipe import Match, Override, Recipe
from qkernels.errors import InvalidArgument, InvalidState, Unsupported, close_matches
from qkernels.frontends.aimet import encodings as enc
from qkernels.frontends.aimet import quantizers as qz
from qkernels.frontends.aimet.batch_norm_fold import graph_of
from qkernels.frontends.aimet.config import OP_TYPES, Tensors, op_type, read_config
from qkernels.frontends.aimet.quantizers import QuantizeDequantize, is_quantized
from qkernels.frontends.common import from_json

logger = logging.getLogger("Quant")
OBSERVERS = {
    "min_max": "minmax",
    "tf": "minmax",
    "post_training_tf": "minmax",
    "training_range_learning_with_tf_init": "minmax",
    "tf_enhanced": "mse",
    "post_training_tf_enhanced": "mse",
    "training_range_learning_with_tf_enhanced_init": "mse",
    "percentile": "percentile",
    "post_training_percentile": "percentile",
}
QuantScheme = Enum("QuantScheme", {name: name for name in OBSERVERS})
# The output is on the grid of the input.
PASSING = {"MaxPool", "Flatten", "Dropout", "Identity", "Pad", "DepthToSpace", "SpaceToDepth", "Gather"}
# Functions in the graph: behind the first a model input is one still, the others give what AIMET knows to be unrounded.
MOVES = "view reshape reshape_as flatten squeeze unsqueeze permute transpose t expand expand_as contiguous clone detach"
MOVES += " getitem select narrow index_select chunk split mean to type float double cpu cuda Identity"
UNROUNDED = "add mul div truediv cat"
CHANNEL_AXIS = {cls: 1 if cls in o.CONVS[3:] else 0 for cls in (*o.CONVS, nn.Linear, nn.PReLU)}


class QuantizationSimModel:
    """`model` with quantizers on weights, model inputs and outputs, as the configuration says.

    Args:
        model: an instance whose operations are modules; see `model_preparer.prepare_model`.
        dummy_input: a tensor, a tuple of arguments or a dict of them.
        quant_scheme: "min_max" (default), "tf_enhanced" (least squared error) or "percentile"; also as enum.
        default_output_bw, default_param_bw: bits, 2 to 8; more, to 21, are simulated and stay float in `convert`.
        in_place: puts the quantizers into `model` itself.
        config_file: a JSON file, a dict, or None for AIMET's default: symmetric weight grids a channel, affine outputs.

    Attributes:
        model: the quantized model, to be calibrated, trained and evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        quant_scheme: Any = None,
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: Any = None,
        default_data_type: Any = None,
        rounding_mode: str | None = None,
    ):
        if getattr(default_data_type, "name", default_data_type) not in (None, "int"):
            raise Unsupported(f"QuantizationSimModel: default_data_type must be int, got {default_data_type!r}")
        if rounding_mode not in (None, "nearest"):
            raise Unsupported(f'QuantizationSimModel: rounding_mode must be "nearest", got {rounding_mode!r}')
        scheme = str(getattr(quant_scheme, "name", quant_scheme or "min_max")).lower()
        if scheme not in OBSERVERS:
            hint = close_matches(scheme, OBSERVERS)
            raise InvalidArgument(f"QuantizationSimModel: quant_scheme: unknown scheme {quant_scheme!r}{hint}")
        self._config, self._scheme = read_config(config_file), scheme
        self._bits = (default_output_bw, default_param_bw)
        self._dummy = arguments(dummy_input)
        self.model = model if in_place else copy.deepcopy(model)
        self._excluded: list[str] = []
        self._place(dummy_input)

    # -- where quantizers go

    def _place(self, dummy_input: Any) -> None:
        if any(map(is_quantized, self.model.modules())):
            raise InvalidState("QuantizationSimModel: the model has quantizers already; give the float model")
        traced = graph_of(self.model, None, dummy_input, "QuantizationSimModel")
        modules, config = modules_of(traced), self._config
        calls = [n for n in traced.graph.nodes if n.op == "call_module"]
        if not calls:
            raise Unsupported(
                f"QuantizationSimModel: {type(self.model).__name__} calls no modules, which are what gets quantizers; "
                "put a single layer into nn.Sequential, make functions modules with prepare_model"
            )
        # A batch normalization that could be folded is part of its layer: the quantizer of the output stands behind it.
        self.foldable = foldable(traced)
        layers = {norm: layer for layer, norm in self.foldable}
        inside = inside_chains(traced, config.supergroups, modules, op_type, layers, _is_never_fused)
        for node in calls:
            module = modules[node.target]
            if is_quantized(module) or type(module) is nn.Identity:
                continue
            tensors = tensor_arguments(node)
            wanted, final = config.of(module), any(user.op == "output" for user in node.users)
            inputs = [self._is_unrounded(a, modules) or wanted.is_input_quantized for a in tensors]
            output = (config.of(modules[layers[node.target]]) if node.target in layers else wanted).is_output_quantized
            if final and config.output_quantized is not None:
                output = config.output_quantized
            output = output and node not in inside and op_type(module) not in PASSING
            output = output and node.target not in layers.values()
            qz.make_quantized(module, len(tensors))
            for i, quantized in enumerate(inputs):
                if quantized:
                    module.input_quantizers[i] = self._quantizer((), wanted, f"{node.target}'s input")
            if output and node.meta["value"].is_float:
                module.output_quantizers[0] = self._quantizer((), wanted, node.target)
            self._place_parameters(node.target, module, wanted, node.target in layers)
        self._relate(calls, modules)

    def _relate(self, calls: list[fx.Node], modules: dict[str, nn.Module]) -> None:
        """What operations say about the quantizers of their neighbours, or of all their calls."""
        config = self._config
        for node in calls:
            wanted = config.of(modules[node.target])
            for call, side, i in places_around(node) if wanted.says_symmetric else ():
                quantizers = getattr(modules[call.target], f"{side}_quantizers", None)
                if quantizers is not None and quantizers[i] is not None:
                    quantizers[i].take_symmetry(wanted.is_symmetric, config.strict_symmetric)
        for node in calls:
            module = modules[node.target]
            quantizer, limits = is_quantized(module) and module.output_quantizers[0], config.of(module).limits
            if quantizer and limits:
                quantizer.limit(*limits)
        for node in reversed(calls):
            module = modules[node.target]
            if isinstance(module, (Concat, nn.ReLU)) and is_quantized(module):
                self._share_with_sources(node, module.output_quantizers[0], modules)
        for module, count in Counter(modules[node.target] for node in calls).items():
            if count > 1 and is_quantized(module) and not module.param_quantizers:
                name = next(node.target for node in calls if modules[node.target] is module)
                logger.warning("%s is called %d times and gets no quantizers; use prepare_model", name, count)
                for table in (module.input_quantizers, module.output_quantizers):
                    for i, quantizer in enumerate(list(table)):
                        if quantizer is not None and quantizer.is_overwrite_allowed():
                            table[i] = None

    def _place_parameters(self, path: str, module: nn.Module, wanted: Tensors, is_folded: bool) -> None:
        """Quantizers of weight and bias; channels of normalizations and embeddings share one grid."""
        axis, is_wide = CHANNEL_AXIS.get(type(module).float_type, 0), type(module).float_type in CHANNEL_AXIS
        if isinstance(module, nn.LayerNorm):
            wanted = replace(wanted, params_symmetric=self._bits[1] >= 16)
        quantized = {WEIGHT: wanted.params_quantized and not is_folded, BIAS: wanted.bias_quantized and is_wide}
        for name, parameter in list(module.named_parameters(recurse=False)):
            if quantized.get(name, False):
                dim, shape = (axis, parameter.shape) if name == WEIGHT else (0, parameter.shape)
                shape = (
                    tuple(n if i == dim else 1 for i, n in enumerate(shape)) if wanted.per_channel and is_wide else ()
                )
                kind = wanted if name == WEIGHT else replace(wanted, params_symmetric=wanted.bias_symmetric)
                made = self._quantizer(shape, kind, f"{path}.{name}", dim)
                module.param_quantizers[name] = made.to(parameter.device)

    def _share_with_sources(
        self, node: fx.Node, quantizer: QuantizeDequantize | None, modules: dict[str, nn.Module]
    ) -> None:
        """What is concatenated, or goes through a ReLU, is on the grid of the result already."""
        for i, source in enumerate(node.all_input_nodes if quantizer is not None else ()):
            module = modules.get(source.target) if source.op == "call_module" else None
            if source.op == "placeholder" and is_quantized(modules[node.target]):
                modules[node.target].input_quantizers[i] = quantizer
            elif module is not None and is_quantized(module) and module.output_quantizers[0] is not None:
                module.output_quantizers[0] = quantizer
            if type(module) is nn.Identity or op_type(module) in PASSING:
                self._share_with_sources(source, quantizer, modules)

    def _is_unrounded(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        """Whether this is a model input, perhaps moved or cast, or comes from a function without quantizers."""
        wanted = self._config.input_quantized and node.meta["value"].is_float
        if _called(node, modules) in UNROUNDED.split():
            return wanted
        while _called(node, modules) in MOVES.split():
            node = node.all_input_nodes[0]
        return wanted and node.op == "placeholder"

    def _quantizer(
        self, shape: tuple[int, ...], wanted: Tensors, source: str, axis: int | None = None
    ) -> QuantizeDequantize:
        made = QuantizeDequantize(shape, **self._kind(wanted, axis is not None), axis=axis if shape else None)
        made.source = made.observer.source = source
        return made

    def _kind(self, wanted: Tensors, is_weight: bool) -> dict[str, Any]:
        """The kind of grid, but for its axis."""
        symmetric, observer = wanted.params_symmetric if is_weight else wanted.is_symmetric, OBSERVERS[self._scheme]
        kind = {"bitwidth": self._bits[is_weight], "symmetric": symmetric, "is_weight": is_weight}
        kind["strict"] = symmetric and self._config.strict_symmetric
        return kind | {"observer": "minmax" if is_weight and observer == "percentile" else observer}

    @property
    def recipe(self) -> Recipe:
        """What the configuration and the bit widths say, as a recipe of the core."""
        config = self._config

        def recipes(wanted: Tensors) -> tuple:
            axis = 0 if wanted.per_channel else None
            weight = qz.tensor_recipe(**self._kind(wanted, True), axis=axis)
            return qz.tensor_recipe(**self._kind(wanted, False)), weight

        rules = [
            Override(Match.of(cls), *recipes(wanted))
            for name, wanted in config.by_type.items()
            for cls in OP_TYPES[name]
        ]
        return Recipe(*recipes(config.defaults), tuple(rules))

    # -- calibration

    def compute_encodings(
        self, forward_pass_callback: Callable[..., Any], forward_pass_callback_args: Any = ...
    ) -> None:
        """Calibrates on what the callback runs: `callback(model)` or `callback(model, args)`."""
        args = () if forward_pass_callback_args is ... else (forward_pass_callback_args,)
        with evaluating(self.model), qz.compute_encodings(self.model):
            forward_pass_callback(self.model, *args)

    def named_qmodules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, m) for name, m in self.model.named_modules() if is_quantized(m))

    def qmodules(self) -> Iterator[nn.Module]:
        return (module for _, module in self.named_qmodules())

    def named_quantizers(self) -> Iterator[tuple[str, QuantizeDequantize]]:
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, QuantizeDequantize))

    def quantizers(self) -> Iterator[QuantizeDequantize]:
        return (quantizer for _, quantizer in self.named_quantizers())

    def quantizer_state_dict(self) -> dict[str, Any]:
        """The part of `model.state_dict()` that quantizers hold."""
        found = tuple(f"{name}." for name, _ in self.named_quantizers())
        return {name: value for name, value in self.model.state_dict().items() if name.startswith(found)}

    def exclude_layers_from_quantization(self, layers_to_exclude: Iterable[nn.Module]) -> None:
        """Takes the quantizers off these modules of `model` and all modules inside them."""
        for layer in layers_to_exclude:
            for module in filter(is_quantized, list(layer.modules())):
                self._excluded += [path for path, found in self.model.named_modules() if found is module]
                qz.make_float(module)

    # -- integers

    def prepared(self) -> nn.Module:
        """The same network as `qkernels.prepare` gives it, for `qkernels.verify`, `exact` and `compare`."""
        work = copy.deepcopy(self.model).eval()
        inputs, outputs, weights = {}, {}, {}
        for path, module in list(work.named_modules()):
            if not is_quantized(module):
                continue
            if isinstance(module, Functional):
                module.traced_as_leaf = False  # it calls its quantizers itself
                continue
            if any(q is not None for q in module.input_quantizers):
                inputs[path] = list(module.input_quantizers)
            if module.output_quantizers[0] is not None:
                outputs[path] = module.output_quantizers[0]
            for name, quantizer in module.param_quantizers.items():
                if name == WEIGHT and quantizer is not None and type(module).float_type in PREPARED:
                    grid = Grid.of(quantizer)
                    if grid.per_channel and CHANNEL_AXIS[type(module).float_type] == 1:
                        grid = grid.repeated(module.groups)  # one a column of the weight: the outputs of all groups
                    weights[path] = grid.quantizer(f"{path}.weight", True).to(quantizer.scale.device)
                elif quantizer is not None:  # what is added or computed in float is the rounded numbers
                    setattr(module, name, nn.Parameter(quantizer(getattr(module, name)).detach()))
            qz.make_float(module)
        return prepare_placed(work, *self._dummy, Places(inputs, outputs, weights))

    def convert(self) -> nn.Module:
        """The integer network: what AIMET leaves to another runtime. `report` of the result says what stayed float."""
        return convert(self.prepared())

    # -- files

    def export(
        self,
        path: str | os.PathLike,
        filename_prefix: str,
        dummy_input: Any = None,
        filename_prefix_encodings: str | None = None,
        encoding_version: str | None = None,
        **unsupported: Any,
    ) -> None:
        """Writes the model without quantizers (`.pth`, weights rounded to their grids) and its encodings.

        `<prefix>.encodings` names activations as ONNX exporters do (/path/Op_output_0), `<prefix>_torch.encodings` by
        module. The version is "1.0.0" unless `encoding_version` or the variable AIMET_ENCODING_VERSION says "0.6.1" or
        "2.0.0".
        """
        given = [name for name, value in unsupported.items() if value]
        if given:
            raise Unsupported(f"export: {sorted(given)} have no counterpart")
        version = encoding_version or os.environ.get("AIMET_ENCODING_VERSION", "1.0.0")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.get_original_model(self.model, qdq_weights=True), folder / f"{filename_prefix}.pth")
        stem = filename_prefix_encodings or filename_prefix
        for name, content in ((stem, self.encodings(version)), (f"{stem}_torch", self.module_encodings())):
            (folder / f"{name}.encodings").write_text(json.dumps(content, indent=4, sort_keys=True))

    @staticmethod
    def get_original_model(model: nn.Module, qdq_weights: bool = False) -> nn.Module:
        """A copy of `model` without quantizers; with `qdq_weights` its weights are on their grids."""
        work = copy.deepcopy(model)
        for module in filter(is_quantized, list(work.modules())):
            with torch.no_grad():
                for name, quantizer in module.param_quantizers.items():
                    if quantizer is not None and qdq_weights:
                        getattr(module, name).copy_(quantizer(getattr(module, name)))
            qz.make_float(module)
        return work

    def grids(self) -> Grids:
        """The grids of now, for `qkernels.core.grids` and the other front ends."""
        found: Grids = {}
        for path, module in self.named_qmodules():
            keyed = {f"input{i}": q for i, q in enumerate(module.input_quantizers)}
            keyed |= {OUTPUT: module.output_quantizers[0]}
            keyed |= {key: q for key, q in module.param_quantizers.items() if key in PARAMETERS}
            made = {key: Grid.of(q) for key, q in keyed.items() if q is not None and q.has_grid()}
            if made:
                found[path] = made
        return found

    def encodings(self, version: str = "1.0.0") -> dict[str, Any]:
        """The encodings by tensor name, in the form of `version`."""
        return enc.write(self.grids(), version, self._tensor_name, self._channel_axis) | self._header(version)

    def module_encodings(self) -> dict[str, Any]:
        """The encodings by module."""
        return enc.write_by_module(self.grids()) | self._header("1.0.0")

    def _tensor_name(self, path: str, key: str) -> str:
        kind = op_type(self.model.get_submodule(path)).removeprefix("Quantized")
        which = "output_0" if key == OUTPUT else f"input_{key.removeprefix('input')}"
        return f"/{scope_of(path, self.model)}/{kind}_{which}"

    def _channel_axis(self, path: str) -> int:
        return CHANNEL_AXIS.get(type(self.model.get_submodule(path)).float_type, 0)

    def _header(self, version: str) -> dict[str, Any]:
        defaults = self._config.defaults
        common = {"version": version, "producer": {"package": "qkernels", "version": __version__}}
        if version == "2.0.0":
            return common
        return common | {
            "excluded_layers": self._excluded,
            "quantizer_args": {
                "activation_bitwidth": self._bits[0],
                "dtype": "int",
                "is_symmetric": defaults.params_symmetric,
                "param_bitwidth": self._bits[1],
                "per_channel_quantization": defaults.per_channel,
                "quant_scheme": self._scheme,
            },
        }

    def load_encodings(
        self,
        encodings: "Mapping[str, Any] | str | os.PathLike",
        strict: bool = True,
        partial: bool = True,
        requires_grad: bool | None = None,
        allow_overwrite: bool | None = True,
        onnx_file: str | os.PathLike | None = None,
    ) -> None:
        """Takes the grids of an encodings file or dict: 0.6.1, 1.0.0 or 2.0.0, by tensor name or by module.

        Args:
            strict: a name that fits nothing, or a place without a quantizer, is an error; else it is left alone.
            partial: quantizers that the file does not name stay; otherwise they are removed.
            requires_grad: whether the ends of the grids are trained from now on; None leaves that as it is.
            allow_overwrite: whether calibration and other files may change them later; None leaves that as it is.
                Quantizers that refuse it now stay as they are.
            onnx_file: the graph that names the tensors; without, the .onnx of the same name beside a file of encodings.
        """
        if onnx_file is None and isinstance(encodings, (str, os.PathLike)):
            beside = Path(encodings).with_suffix(".onnx")
            onnx_file = beside if beside.exists() else None
        modules = dict(self.named_qmodules())
        graph = cache(lambda: places_in(onnx_file, modules)) if onnx_file is not None else dict
        read = enc.read(from_json(encodings), modules, strict, graph)
        taken = {self._take(modules[path], path, key, read[path][key], strict) for path in read for key in read[path]}
        for quantizer in taken - {None}:
            if requires_grad is not None:
                quantizer.requires_grad_(requires_grad)
        for module in () if partial else modules.values():
            for table in (module.input_quantizers, module.output_quantizers, module.param_quantizers):
                for key in range(len(table)) if isinstance(table, nn.ModuleList) else list(table):
                    if table[key] is not None and table[key] not in taken and table[key].is_overwrite_allowed():
                        table[key] = None
        for quantizer in taken - {None} if allow_overwrite is not None else ():
            quantizer.allow_overwrite(allow_overwrite)

    def _take(self, module: nn.Module, path: str, key: str, grid: Grid, strict: bool) -> QuantizeDequantize | None:
        """The quantizer of this place, which gets the grid; None if it keeps its own, or sizes are computed there."""
        table, index, where = module.param_quantizers, key, f"param_encodings.{path}.{key}"
        if key not in PARAMETERS:
            if isinstance(module, Functional) and not len(module.input_quantizers):
                return None
            side = "output" if key == OUTPUT else "input"
            table, index = getattr(module, f"{side}_quantizers"), int(key.removeprefix(side) or 0)
            where = f"activation_encodings.{path}.{side}.{index}"
            if index >= len(table):
                raise InvalidArgument(f"{where}: {path} has no such {side}")
        elif getattr(module, key, None) is None:
            raise InvalidArgument(f"{where}: the module has none")
        quantizer = table[index]
        if quantizer is None and strict:
            raise InvalidState(f"{where}: no quantizer present; put one there, or give strict=False to leave it out")
        if quantizer is None or not quantizer.is_overwrite_allowed():
            return None
        if len(grid.scale) == quantizer.min.numel():
            quantizer.take_grid(grid)
            return quantizer
        axis = self._channel_axis(path) if key == WEIGHT else 0
        channels = getattr(module, key).shape[axis] if key in PARAMETERS else 1
        if len(grid.scale) not in (1, channels):
            raise InvalidArgument(f"{where}: {len(grid.scale)} grids for {channels} channels")
        made = QuantizeDequantize.from_grid(grid, getattr(module, key).shape, axis).to(quantizer.min.device)
        made.source, table[index] = quantizer.source, made.requires_grad_(quantizer.min.requires_grad)
        return made

    def set_and_freeze_param_encodings(self, encoding_path: "Mapping[str, Any] | str | os.PathLike") -> None:
        """Takes the weight grids of a file and keeps them through compute_encodings and training."""
        content = from_json(encoding_path)
        weights = content.get("param_encodings", content) if isinstance(content, Mapping) else content
        self.load_encodings({"param_encodings": weights}, requires_grad=False, allow_overwrite=False)

    def load_and_freeze_encodings(self, encoding_path: Any, ignore_when_quantizer_disabled: bool = False) -> None:
        self.load_encodings(encoding_path, not ignore_when_quantizer_disabled, True, False, False)

    def __str__(self) -> str:
        return f"QuantizationSimModel({self.model})"


def save_checkpoint(quant_sim_model: QuantizationSimModel, file_path: str | os.PathLike) -> None:
    """Pickles the simulation, for `load_checkpoint`."""
    torch.save(quant_sim_model, file_path)


def load_checkpoint(file_path: str | os.PathLike) -> QuantizationSimModel:
    """What `save_checkpoint` saved. Only for files that one trusts: reading them runs their code."""
    return torch.load(file_path, weights_only=False)


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The name of the function, of the method or of the class of the module; "" if this is no call."""
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    return getattr(node.target, "__name__", node.target) if node.op.startswith("call_") else ""


def _is_never_fused(module: nn.Module) -> bool:
    """Convolutions that AIMET leaves out of supergroups: of three dimensions, and depthwise."""
    if not isinstance(module, o.CONVS):
        return False
    return module.weight.dim() == 5 or 1 != module.groups == module.in_channels
