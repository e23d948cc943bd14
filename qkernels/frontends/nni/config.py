"""NNI's `config_list` (API of 3.0): which targets of which modules get which grid. The first entry of a target wins."""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qkernels.core.attach import Site
from qkernels.core.qspec import QSpec
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.common import close_matches

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TYPES = (*WEIGHTED, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.MaxPool2d)
SELECTING = ("op_names", "op_names_re", "op_types")
EXCLUDING = tuple(f"exclude_{key}" for key in SELECTING)
SETTINGS = ("quant_dtype", "quant_scheme", "granularity", "apply_method")
LEGACY = ("quant_types", "quant_bits", "quant_start_step", "op_partial_names", "exclude")
KEYS = (*SELECTING, *EXCLUDING, *SETTINGS, "target_names", "target_settings", "fuse_names", *LEGACY)
SCHEMES = ("affine", "symmetric")
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Setting:
    """The settings of one target: `dtype` is int or uint, `scheme` affine or symmetric."""

    bits: int = 8
    signed: bool = True
    scheme: str | None = None
    per_channel: bool = False

    @property
    def quant_dtype(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    def spec(self, is_weight: bool) -> QSpec:
        """The grid. Unsigned weights lie on the same grid with codes moved down by the half: kernels take int8."""
        half = 2 ** (self.bits - 1)
        symmetric = self.scheme != "affine"
        if self.signed:
            return QSpec(torch.int8, 1 - half, half - 1, symmetric, self.per_channel, 0, EPS)
        if is_weight:
            return QSpec(torch.int8, -half, half - 1, symmetric, self.per_channel, 0, EPS)
        return QSpec(torch.uint8, 0, 2 * half - 1, symmetric, self.per_channel, 0, EPS)


Targets = dict[str, Setting]  # by the name of the target: weight, _input_0, _output_0


@dataclass(frozen=True)
class Settings:
    """What a whole `config_list` says about a model: settings by module and target, and what is fused."""

    targets: dict[str, Targets]
    fused: dict[str, tuple[str, ...]]

    def sites(self, recipe_of: Any, start_step: int = 0) -> dict[str, Site]:
        """Where the core attaches Quantizers; `recipe_of(setting, is_weight)` is what the quantizer's method asks."""
        found = {}
        for path, targets in self.targets.items():
            recipes = {name: recipe_of(setting, name == "weight") for name, setting in targets.items()}
            inputs = {int(n.removeprefix("_input_")): r for n, r in recipes.items() if n.startswith("_input_")}
            norm, clamp = (*self.fused.get(path, ()), None, None)[:2]
            found[path] = Site(inputs, recipes.get("_output_0"), recipes.get("weight"), norm, clamp, start_step)
        return found

    def recipe(self, model: nn.Module, recipe_of: Any) -> Recipe:
        """The same as a Recipe for `qkernels.prepare`, which places activation grids by itself."""
        pairs = {}
        for path, module in model.named_modules():
            if isinstance(module, WEIGHTED):
                targets = self.targets.get(path, {})
                active = [s for name, s in targets.items() if name != "weight"]
                weight = recipe_of(targets["weight"], True) if "weight" in targets else None
                pairs[path] = weight and (recipe_of(active[0], False) if active else None, weight)
        chosen = [pair for pair in pairs.values() if pair]
        if not chosen:
            raise InvalidArgument("config_list: no linear or convolution has its weight quantized")
        activation = next((a for a, _ in chosen if a), TensorRecipe(QSpec.activation(), "moving_average"))
        base = Recipe(activation, chosen[0][1])
        overrides = []
        for path, pair in pairs.items():
            if pair is None:
                overrides.append(Override(Match("name", path), skip=True))
            elif (pair[0] or base.activation, pair[1]) != (base.activation, base.weight):
                overrides.append(Override(Match("name", path), *pair))
        return replace(base, overrides=tuple(overrides))


def parse(model: nn.Module, config_list: Iterable[Mapping[str, Any]]) -> Settings:
    """Checks every key and every name, and says which module gets what.

    Raises:
        InvalidArgument: with the path of the key, such as `config_list[1].target_settings.weight.granularity`.
        Unsupported: a documented form that has no counterpart here.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise InvalidArgument(f"config_list: must be a list of dicts, got {config_list!r}")
    modules = {path: m for path, m in model.named_modules() if path}
    targets: dict[str, Targets] = {}
    fused: dict[str, tuple[str, ...]] = {}
    excluded: set[str] = set()
    entries = [_modern(entry, f"config_list[{i}]") for i, entry in enumerate(config_list)]
    for entry, where in entries:
        if entry.pop("exclude", False):
            excluded |= _selected(modules, entry, where)
    for entry, where in entries:
        fused |= _fused(modules, entry.get("fuse_names", ()), f"{where}.fuse_names")
        for path in sorted(_selected(modules, entry, where) - excluded, key=list(modules).index):
            for name, setting in _targets(path, modules[path], entry, where).items():
                targets.setdefault(path, {}).setdefault(name, setting)
    for path, parts in fused.items():
        for part in parts:
            if part is not None and part in targets:
                raise InvalidArgument(f"config_list: {part} is part of {path} (fuse_names) and takes no settings")
    return Settings({path: found for path, found in targets.items() if found}, fused)


def _modern(entry: Any, where: str) -> tuple[dict[str, Any], str]:
    """A checked copy; keys of the API of 2.x become those of 3.0."""
    if not isinstance(entry, Mapping):
        raise InvalidArgument(f"{where}: must be a dict, got {entry!r}")
    for key in entry:
        if key not in KEYS:
            raise InvalidArgument(f"{where}.{key}: unknown key{close_matches(key, KEYS)}")
    entry = dict(entry)
    if "quant_start_step" in entry:
        raise Unsupported(f"{where}.quant_start_step: give it to the quantizer, QATQuantizer(..., quant_start_step=n)")
    if "op_partial_names" in entry:
        entry["op_names_re"] = [f".*{re.escape(name)}.*" for name in entry.pop("op_partial_names")]
    types, bits = entry.pop("quant_types", None), entry.pop("quant_bits", None)
    if types is not None:
        known = {"weight": "weight", "input": "_input_", "output": "_output_"}
        for name in types:
            if name not in known:
                raise InvalidArgument(f"{where}.quant_types: {name!r} is none of {sorted(known)}")
        entry["target_names"] = [known[name] for name in types]
        widths = bits if isinstance(bits, Mapping) else dict.fromkeys(types, 8 if bits is None else bits)
        entry["target_settings"] = {known[n]: {"quant_dtype": f"int{b}"} for n, b in widths.items() if n in types}
        entry.setdefault("quant_dtype", None)
    if not any(key in entry for key in SELECTING):
        raise InvalidArgument(f"{where}: needs one of {list(SELECTING)}")
    if not entry.get("exclude") and "quant_dtype" not in entry and "target_settings" not in entry:
        raise InvalidArgument(f"{where}.quant_dtype: missing; say for example 'int8'")
    return entry, where


def _selected(modules: Mapping[str, nn.Module], entry: Mapping[str, Any], where: str) -> set[str]:
    named = set()
    for name in entry.get("op_names", ()):
        if name not in modules:
            raise InvalidArgument(f"{where}.op_names: the model has no module {name!r}{close_matches(name, modules)}")
        named.add(name)
    named |= _matching(modules, entry, "op_names_re", where)
    if "op_types" in entry:
        of_type = _of_types(modules, entry["op_types"], f"{where}.op_types")
        named = of_type if "op_names" not in entry and "op_names_re" not in entry else named & of_type
    named -= set(entry.get("exclude_op_names", ())) | _matching(modules, entry, "exclude_op_names_re", where)
    return named - _of_types(modules, entry.get("exclude_op_types", ()), f"{where}.exclude_op_types")


def _matching(modules: Mapping[str, nn.Module], entry: Mapping[str, Any], key: str, where: str) -> set[str]:
    found: set[str] = set()
    for pattern in entry.get(key, ()):
        hits = {path for path in modules if re.match(pattern, path)}
        if not hits:
            raise InvalidArgument(f"{where}.{key}: no module of the model matches {pattern!r}")
        found |= hits
    return found


def _of_types(modules: Mapping[str, nn.Module], names: Iterable[str], where: str) -> set[str]:
    found: set[str] = set()
    present = {type(m).__name__ for m in modules.values()}
    known = present | {cls.__name__ for cls in TYPES} | {"default"}
    for name in names:
        if name not in known:
            raise InvalidArgument(f"{where}: no module is a {name!r}{close_matches(name, known)}")
        if name == "default":
            found |= {path for path, m in modules.items() if isinstance(m, WEIGHTED)}
        found |= {path for path, m in modules.items() if type(m).__name__ == name}
    return found


def _targets(path: str, module: nn.Module, entry: Mapping[str, Any], where: str) -> Targets:
    if not isinstance(module, TYPES):
        raise InvalidArgument(
            f"{where}: {path} is a {type(module).__name__}; targets are known for {[cls.__name__ for cls in TYPES]}"
        )
    everything = ["_input_", "weight", "_output_"] if isinstance(module, WEIGHTED) else ["_input_", "_output_"]
    names = entry.get("target_names", everything)
    own = entry.get("target_settings", {})
    if not isinstance(own, Mapping):
        raise InvalidArgument(f"{where}.target_settings: must be a dict of dicts, got {own!r}")
    common = {key: entry[key] for key in SETTINGS if key in entry}
    found = {}
    for name in [*names, *(n for n in own if n not in names)]:
        here = f"{where}.target_settings.{name}" if name in own else where
        target = _canonical(name, path, module, f"{where}.target_names")
        if target != "weight" or isinstance(module, WEIGHTED):
            found[target] = _setting({**common, **own.get(name, {})}, target == "weight", here)
    return found


def _canonical(name: str, path: str, module: nn.Module, where: str) -> str:
    """`weight`, `_input_0`, ... or `_output_0`."""
    if name in ("weight", "_output_", "_output_0"):
        return "weight" if name == "weight" else "_output_0"
    if name == "_input_":
        return "_input_0"
    if name.startswith("_input_"):
        argument = name.removeprefix("_input_")
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if argument.isdigit():
            return name
        if argument in names:
            return f"_input_{names.index(argument)}"
        raise InvalidArgument(f"{where}: {path} has no argument {argument!r}; there are {names}")
    if name.startswith("_output_"):
        raise Unsupported(f"{where}: {name}: modules with several outputs cannot be split; use _output_0")
    if name == "bias":
        raise Unsupported(f"{where}: bias: a bias needs no grid of its own: it is added in 32 bits; leave it")
    raise InvalidArgument(f"{where}: unknown target {name!r}; there are weight, _input_, _input_0, _output_, _output_0")


def _setting(entry: Mapping[str, Any], is_weight: bool, where: str) -> Setting:
    for key in entry:
        if key not in SETTINGS:
            raise InvalidArgument(f"{where}.{key}: unknown key{close_matches(key, SETTINGS)}")
    dtype, scheme = entry.get("quant_dtype") or "int8", entry.get("quant_scheme")
    match = re.fullmatch(r"(u?)int(\d+)", dtype) if isinstance(dtype, str) else None
    if match is None or int(match[2]) < 1:
        raise InvalidArgument(f"{where}.quant_dtype: must be None, int{{N}} or uint{{N}}, got {dtype!r}")
    bits = int(match[2])
    if not 2 <= bits <= 8:
        raise Unsupported(f"{where}.quant_dtype: {dtype}: there are kernels for 2 to 8 bits")
    if scheme is not None and scheme not in SCHEMES:
        raise InvalidArgument(f"{where}.quant_scheme: must be one of {list(SCHEMES)} or None, got {scheme!r}")
    granularity = entry.get("granularity") or "default"
    if granularity not in ("default", "out_channel", "in_channel", "per_channel") and not isinstance(
        granularity, (list, tuple)
    ):
        raise InvalidArgument(f"{where}.granularity: unknown {granularity!r}; there are 'default' and 'out_channel'")
    if granularity != "default" and not (is_weight and granularity == "out_channel"):
        raise Unsupported(
            f"{where}.granularity: {granularity!r}: no integer layer computes with it; weights take 'default' or "
            "'out_channel', inputs and outputs 'default'"
        )
    return Setting(bits, not match[1], scheme, granularity == "out_channel")


def _fused(modules: Mapping[str, nn.Module], groups: Iterable[Any], where: str) -> dict[str, tuple[str, ...]]:
    """(norm or None, clamp or None) by the path of the layer that they belong to."""
    found = {}
    for i, group in enumerate(groups):
        here = f"{where}[{i}]"
        if not isinstance(group, (list, tuple)) or not 2 <= len(group) <= 3:
            raise InvalidArgument(f"{here}: must be (layer, norm), (layer, activation) or all three, got {group!r}")
        for name in group:
            if name not in modules:
                raise InvalidArgument(f"{here}: the model has no module {name!r}{close_matches(name, modules)}")
        layer, *rest = group
        if not isinstance(modules[layer], WEIGHTED):
            raise Unsupported(
                f"{here}: {layer} is a {type(modules[layer]).__name__}; only layers with weights are fused"
            )
        norm = rest.pop(0) if isinstance(modules[rest[0]], nn.modules.batchnorm._BatchNorm) else None
        clamp = rest.pop(0) if rest else None
        if rest or (clamp is not None and not isinstance(modules[clamp], (nn.ReLU, nn.ReLU6, nn.Hardtanh))):
            raise InvalidArgument(f"{here}: only a BatchNorm and ReLU, ReLU6 or Hardtanh may follow; got {group!r}")
        found[layer] = (norm, clamp)
    return found
