"""QuantizationSimModel: a model with quantizers, its encodings, and its integer network."""

import copy
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
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
from qkernels.core.fusion import chain_from, foldable
from qkernels.core.graph import Untraceable, arguments, modules_of, trace
from qkernels.core.grids import Grid, Grids
from qkernels.core.layers import PREPARED
from qkernels.core.onnx_names import places_in, scope_of
from qkernels.core.placed import Places, prepare_placed
from qkernels.core.recipe import Match, Override, Recipe
from qkernels.errors import InvalidArgument, Unsupported, close_matches
from qkernels.frontends.aimet import encodings as enc
from qkernels.frontends.aimet import quantizers as qz
from qkernels.frontends.aimet.config import OP_TYPES, Config, Tensors, op_type, read_config
from qkernels.frontends.aimet.quantizers import QuantizeDequantize, is_quantized
from qkernels.frontends.common import from_json

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
        self._place()

    # -- where quantizers go

    def _place(self) -> None:
        training = self.model.training
        try:
            traced = trace(self.model.eval(), *self._dummy)
        except Untraceable as error:
            raise Unsupported(
                f"QuantizationSimModel: the model has no graph ({error}); make it one with prepare_model, or name the "
                "parts with control flow in modules_to_exclude"
            ) from None
        finally:
            self.model.train(training)
        modules, config = modules_of(traced), self._config
        calls = [n for n in traced.graph.nodes if n.op == "call_module" and not is_quantized(modules[n.target])]
        # A batch normalization that could be folded is part of its layer: the quantizer of the output stands behind it.
        self.foldable = foldable(traced)
        layers = {norm: layer for layer, norm in self.foldable}
        inside = _inside_supergroups(traced, modules, config, layers)
        for node in calls:
            module = modules[node.target]
            if is_quantized(module) or type(module) is nn.Identity:
                continue
            tensors = [a for a in node.args if isinstance(a, fx.Node) and a.meta["value"].kind == "tensor"]
            wanted, final = config.of(module), any(user.op == "output" for user in node.users)
            inputs = [self._reads_model_input(a) or wanted.is_input_quantized for a in tensors]
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

        for node in reversed(calls):
            module = modules[node.target]
            if isinstance(module, (Concat, nn.ReLU)) and is_quantized(module):
                self._share_with_sources(node, module.output_quantizers[0], modules)

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

    def _reads_model_input(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and self._config.input_quantized and node.meta["value"].is_float

    def _quantizer(
        self, shape: tuple[int, ...], wanted: Tensors, source: str, axis: int | None = None
    ) -> QuantizeDequantize:
        made = QuantizeDequantize(shape, **self._kind(wanted, axis is not None), axis=axis if shape else None)
        made.source = made.observer.source = source
        return made

    def _kind(self, wanted: Tensors, is_weight: bool) -> dict[str, Any]:
        """The kind of grid, but for its axis."""
        symmetric, observer = wanted.params_symmetric if is_weight else wanted.is_symmetric, OBSERVERS[self._scheme]
        kind = {"bitwidth": self._bits[is_weight], "symmetric": symmetric, "signed": is_weight}
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
        training = self.model.training
        with qz.compute_encodings(self.model.eval()):
            forward_pass_callback(self.model, *args)
        self.model.train(training)

    def named_qmodules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, m) for name, m in self.model.named_modules() if is_quantized(m))

    def named_quantizers(self) -> Iterator[tuple[str, QuantizeDequantize]]:
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, QuantizeDequantize))

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
                    weights[path] = Grid.of(quantizer).quantizer(f"{path}.weight", True).to(quantizer.scale.device)
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
        torch.save(self.original_model(), folder / f"{filename_prefix}.pth")
        stem = filename_prefix_encodings or filename_prefix
        for name, content in ((stem, self.encodings(version)), (f"{stem}_torch", self.module_encodings())):
            (folder / f"{name}.encodings").write_text(json.dumps(content, indent=4, sort_keys=True))

    def original_model(self) -> nn.Module:
        """The model without quantizers, its weights on their grids."""
        work = copy.deepcopy(self.model)
        for _, module in list(work.named_modules()):
            if is_quantized(module):
                with torch.no_grad():
                    for name, quantizer in module.param_quantizers.items():
                        if quantizer is not None:
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
        return enc.write_by_module(self.grids()) | self._header("0.6.1")

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
            "excluded_layers": [],
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
        allow_overwrite: bool = True,
        onnx_file: str | os.PathLike | None = None,
    ) -> None:
        """Takes the grids of an encodings file or dict: 0.6.1, 1.0.0 or 2.0.0, by tensor name or by module.

        Args:
            strict: a name that fits nothing is an error.
            partial: quantizers that the file does not name stay; otherwise they are removed.
            requires_grad: whether the ends of the grids are trained from now on.
            allow_overwrite: whether compute_encodings may change them later.
            onnx_file: the graph that names the tensors; without, the .onnx of the same name beside a file of encodings.
        """
        if onnx_file is None and isinstance(encodings, (str, os.PathLike)):
            beside = Path(encodings).with_suffix(".onnx")
            onnx_file = beside if beside.exists() else None
        kept: set[QuantizeDequantize] = set()
        modules = dict(self.named_qmodules())
        graph = cache(lambda: places_in(onnx_file, modules)) if onnx_file is not None else dict
        for path, table in enc.read(from_json(encodings), modules, strict, graph).items():
            for key, grid in table.items():
                made = self._take(modules[path], path, key, grid)
                if made is not None:
                    made.source = path
                    kept.add(made)
        for quantizer in kept:
            quantizer.to(next(self.model.parameters()).device)
            if not allow_overwrite:
                quantizer.freeze(requires_grad is not False)
            elif requires_grad is not None:
                quantizer.min.requires_grad_(requires_grad)
                quantizer.max.requires_grad_(requires_grad)
        if not partial:
            for module in modules.values():
                for table in (module.input_quantizers, module.output_quantizers, module.param_quantizers):
                    for key in range(len(table)) if isinstance(table, nn.ModuleList) else list(table):
                        if table[key] not in kept:
                            table[key] = None

    def _take(self, module: nn.Module, path: str, key: str, grid: Grid) -> QuantizeDequantize | None:
        """Puts a quantizer with this grid in its place; None where sizes are computed, which stay what they are."""
        if key not in PARAMETERS and isinstance(module, Functional) and not len(module.input_quantizers):
            return None
        if key not in PARAMETERS:
            side = "output" if key == OUTPUT else "input"
            index, table = int(key.removeprefix(side) or 0), getattr(module, f"{side}_quantizers")
            if index >= len(table):
                raise InvalidArgument(f"activation_encodings.{path}.{side}.{index}: {path} has no such {side}")
            table[index] = QuantizeDequantize.from_grid(grid, (1,), None)
            return table[index]
        if getattr(module, key, None) is None:
            raise InvalidArgument(f"param_encodings.{path}.{key}: the module has none")
        axis = CHANNEL_AXIS.get(type(module).float_type, 0) if key == WEIGHT else 0
        shape = getattr(module, key).shape
        if len(grid.scale) not in (1, shape[axis]):
            raise InvalidArgument(f"param_encodings.{path}.{key}: {len(grid.scale)} grids for {shape[axis]} channels")
        module.param_quantizers[key] = QuantizeDequantize.from_grid(grid, shape, axis)
        return module.param_quantizers[key]

    def set_and_freeze_param_encodings(self, encoding_path: "Mapping[str, Any] | str | os.PathLike") -> None:
        """Takes the weight grids of a file and keeps them through compute_encodings and training."""
        content = from_json(encoding_path)
        weights = content.get("param_encodings", content) if isinstance(content, Mapping) else content
        self.load_encodings({"param_encodings": weights}, requires_grad=False, allow_overwrite=False)

    def load_and_freeze_encodings(self, encoding_path: Any, ignore_when_quantizer_disabled: bool = False) -> None:
        self.load_encodings(encoding_path, requires_grad=False, allow_overwrite=False)

    def __str__(self) -> str:
        return f"QuantizationSimModel({self.model})"


def _inside_supergroups(
    traced: fx.GraphModule, modules: dict[str, nn.Module], config: Config, norms: Collection[str]
) -> set[fx.Node]:
    """The calls whose output goes nowhere but into the next operation of their group, or into one of `norms` before."""
    inside: set[fx.Node] = set()
    for group in config.supergroups:
        for node in traced.graph.nodes:
            if node.op != "call_module" or _is_never_fused(modules[node.target]):
                continue
            chain = chain_from(node, group, modules, op_type, norms)
            inside.update(chain[:-1])
            inside.update(reader for part in chain[:-1] for reader in part.users if reader.target in norms)
    return inside


def _is_never_fused(module: nn.Module) -> bool:
    """Convolutions that AIMET leaves out of supergroups: of three dimensions, and depthwise."""
    if not isinstance(module, o.CONVS):
        return False
    return module.weight.dim() == 5 or 1 != module.groups == module.in_channels
