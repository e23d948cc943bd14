"""NNI's `config_list` (API of 3.0): which targets of which modules get which grid. The first entry of a target wins."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qkernels.core.attach import Site
from qkernels.core.qspec import QSpec
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.common import WEIGHTED, check_keys, check_one_of, with_names, with_types

TYPES = (*WEIGHTED, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.MaxPool2d)
SELECTING = ("op_names", "op_names_re", "op_types")
SETTINGS = ("quant_dtype", "quant_scheme", "granularity", "apply_method")
LEGACY = ("quant_types", "quant_bits", "quant_start_step", "op_partial_names", "exclude")
EXCLUDING = tuple(f"exclude_{key}" for key in SELECTING)
KEYS = (*SELECTING, *EXCLUDING, *SETTINGS, "target_names", "target_settings", "fuse_names", *LEGACY)
LEGACY_TARGETS = {"weight": "weight", "input": "_input_", "output": "_output_"}
GRANULARITIES = ("default", "out_channel", "in_channel", "per_channel")
METHODS = (None, "bypass", "clamp_round", "qat_clamp_round")
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Setting:
    """The settings of one target; scheme is "affine", "symmetric" or None."""

    bits: int = 8
    signed: bool = True
    scheme: str | None = None
    per_channel: bool = False

    def spec(self, is_weight: bool) -> QSpec:
        kind = {"symmetric": self.scheme != "affine", "per_channel": self.per_channel, "min_scale": EPS}
        return QSpec.even(self.bits, self.signed, is_weight, **kind)


@dataclass(frozen=True)
class Settings:
    """What a whole `config_list` says about a model: settings by module and target, and what is fused."""

    targets: dict[str, dict[str, Setting]]
    fused: dict[str, tuple[str | None, str | None]]

    def sites(self, recipe_of: Callable[[str, Setting], TensorRecipe], start_step: int = 0) -> dict[str, Site]:
        """Where Quantizers go; `recipe_of(target, setting)` is what the quantizer's method asks for."""
        found = {}
        for path, targets in self.targets.items():
            recipes = {name: recipe_of(name, setting) for name, setting in targets.items()}
            inputs = {int(n.removeprefix("_input_")): r for n, r in recipes.items() if n.startswith("_input_")}
            norm, clamp = self.fused.get(path, (None, None))
            output = recipes.get("_output_0")
            if clamp is not None and output is not None:
                found[clamp] = Site(output=output, start_step=start_step)
                output = None
            found[path] = Site(inputs, output, recipes.get("weight"), norm, folds=True, start_step=start_step)
        return found

    def layer(self, path: str) -> str:
        """The layer that the activation at `path` is fused with, whose output it rounds; otherwise `path`."""
        return next((layer for layer, (_, clamp) in self.fused.items() if clamp == path), path)


def parse(model: nn.Module, config_list: Iterable[Mapping[str, Any]]) -> Settings:
    """Checks every key and every name, and says which module gets what.

    Raises:
        InvalidArgument: with the path of the key, such as `config_list[1].target_settings.weight.granularity`.
        Unsupported: a documented form that has no counterpart here.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise InvalidArgument(f"config_list: must be a list of dicts, got {config_list!r}")
    modules = {path: m for path, m in model.named_modules() if path}
    entries = [(f"config_list[{i}]", _modern(entry, f"config_list[{i}]")) for i, entry in enumerate(config_list)]
    excluded = {path for where, entry in entries if entry.get("exclude") for path in _selected(modules, entry, where)}
    targets: dict[str, dict[str, Setting]] = {}
    fused: dict[str, tuple[str | None, str | None]] = {}
    for where, entry in entries:
        if entry.get("exclude"):
            continue
        fused |= _fused(modules, entry.get("fuse_names", ()), f"{where}.fuse_names")
        chosen = _selected(modules, entry, where) - excluded
        for path in (path for path in modules if path in chosen):
            targets[path] = _targets(path, modules[path], entry, where) | targets.get(path, {})
    for path, parts in fused.items():
        if path not in targets:
            raise InvalidArgument(f"config_list: {path} is fused with {parts} (fuse_names) and has no settings")
        for part in targets.keys() & set(parts):
            raise InvalidArgument(f"config_list: {part} is part of {path} (fuse_names) and takes no settings")
    return Settings(targets, fused)


def _modern(entry: Any, where: str) -> dict[str, Any]:
    """A checked copy; keys of the API of 2.x become those of 3.0."""
    check_keys(entry, KEYS, where)
    entry = dict(entry)
    if "quant_start_step" in entry:
        raise Unsupported(f"{where}.quant_start_step: give it to the quantizer, QATQuantizer(..., quant_start_step=n)")
    if "op_partial_names" in entry:
        entry["op_names_re"] = [f".*{re.escape(name)}.*" for name in entry.pop("op_partial_names")]
    types, bits = entry.pop("quant_types", None), entry.pop("quant_bits", 8)
    if types is not None:
        for name in types:
            check_one_of(name, LEGACY_TARGETS, f"{where}.quant_types")
        widths = bits if isinstance(bits, Mapping) else dict.fromkeys(types, bits)
        entry["target_names"] = [LEGACY_TARGETS[name] for name in types]
        own = {LEGACY_TARGETS[n]: {"quant_dtype": f"int{bits}"} for n, bits in widths.items() if n in types}
        entry["target_settings"] = own
    if not any(key in entry for key in SELECTING):
        raise InvalidArgument(f"{where}: needs one of {list(SELECTING)}")
    if not entry.keys() & {"exclude", "quant_dtype", "target_settings"}:
        raise InvalidArgument(f"{where}.quant_dtype: missing; say for example 'int8'")
    return entry


def _selected(modules: Mapping[str, nn.Module], entry: Mapping[str, Any], where: str) -> set[str]:
    """What names or patterns and types say, without what is excluded."""

    def said(prefix: str) -> tuple[set[str], set[str]]:
        names, patterns, types = (f"{prefix}{key}" for key in SELECTING)
        named = with_names(modules, entry.get(names, ()), f"{where}.{names}")
        named |= _matching(modules, entry.get(patterns, ()), f"{where}.{patterns}")
        return named, with_types(modules, entry.get(types, ()), TYPES, f"{where}.{types}")

    named, of_type = said("")
    by_name, by_type = "op_names" in entry or "op_names_re" in entry, "op_types" in entry
    chosen = named & of_type if by_name and by_type else named | of_type
    chosen = chosen.difference(*said("exclude_"))
    if not chosen:
        raise InvalidArgument(f"{where}: selects no module of the model")
    return chosen


def _matching(modules: Mapping[str, nn.Module], patterns: Iterable[str], where: str) -> set[str]:
    hits = {pattern: {path for path in modules if re.match(pattern, path)} for pattern in patterns}
    for pattern in (pattern for pattern, paths in hits.items() if not paths):
        raise InvalidArgument(f"{where}: no module of the model matches {pattern!r}")
    return set().union(*hits.values())


def _targets(path: str, module: nn.Module, entry: Mapping[str, Any], where: str) -> dict[str, Setting]:
    if not isinstance(module, TYPES):
        kinds = [cls.__name__ for cls in TYPES]
        raise InvalidArgument(f"{where}: {path} is a {type(module).__name__}; targets are known for {kinds}")
    names = entry.get("target_names", ["_input_", *["weight"] * isinstance(module, WEIGHTED), "_output_"])
    own = entry.get("target_settings", {})
    check_keys(own, own, f"{where}.target_settings")
    common = {key: entry[key] for key in SETTINGS if key in entry}
    found = {}
    for name in dict.fromkeys([*names, *own]):
        here = f"{where}.target_settings.{name}" if name in own else where
        check_keys(own.get(name, {}), SETTINGS, here)
        target = _canonical(name, path, module, f"{where}.target_names")
        if target != "weight" or isinstance(module, WEIGHTED):
            setting = _setting({**common, **own.get(name, {})}, target, module, here)
            if found.setdefault(target, setting) != setting:
                raise InvalidArgument(f"{here}: {target} of {path} has two settings, {found[target]} and {setting}")
    if not found:
        raise InvalidArgument(f"{where}.target_names: {path} is a {type(module).__name__} and has none of {names}")
    return found


def _canonical(name: str, path: str, module: nn.Module, where: str) -> str:
    """`weight`, `_input_0`, ... or `_output_0`."""
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    kind, _, which = name.removeprefix("_").partition("_")
    if name == "weight" or name in ("_output_", "_output_0"):
        return "weight" if name == "weight" else "_output_0"
    if kind == "input" and which in ("", *arguments):
        return f"_input_{arguments.index(which) if which else 0}"
    if kind == "input" and which.isdigit() and int(which) < len(arguments):
        return name
    if kind == "input":
        raise InvalidArgument(f"{where}: {path} has no argument {which!r}; there are {arguments}")
    if kind == "output":
        raise Unsupported(f"{where}: {name}: modules with several outputs cannot be split; use _output_0")
    if name == "bias":
        raise Unsupported(f"{where}: bias: a bias needs no grid of its own: it is added in 32 bits; leave it")
    raise InvalidArgument(f"{where}: unknown target {name!r}; there are weight, _input_, _input_0, _output_, _output_0")


def _setting(entry: Mapping[str, Any], target: str, module: nn.Module, where: str) -> Setting:
    dtype, scheme = entry.get("quant_dtype") or "int8", entry.get("quant_scheme")
    match = re.fullmatch(r"(u?)int([1-9]\d*)", dtype) if isinstance(dtype, str) else None
    if match is None:
        raise InvalidArgument(f"{where}.quant_dtype: must be None, int{{N}} or uint{{N}}, got {dtype!r}")
    bits = int(match[2])
    if not 2 <= bits <= 8:
        raise Unsupported(f"{where}.quant_dtype: {dtype}: there are kernels for 2 to 8 bits; leave the target out")
    check_one_of(scheme, ("affine", "symmetric", None), f"{where}.quant_scheme")
    check_one_of(entry.get("apply_method"), METHODS, f"{where}.apply_method")
    given = entry.get("granularity") or "default"
    shape = module.weight.shape if target == "weight" else None
    granularity = _named(given, shape, where)
    if granularity != "default" and (shape is None or granularity != "out_channel"):
        raise Unsupported(
            f"{where}.granularity: {given!r}: no integer layer computes with it; weights take 'default' or "
            "'out_channel', inputs and outputs 'default'"
        )
    return Setting(bits, not match[1], scheme, granularity == "out_channel")


def _named(granularity: Any, shape: Any, where: str) -> str:
    """The name of a granularity; a block list has one where its blocks are rows or the whole tensor."""
    if not isinstance(granularity, (list, tuple)) or not granularity:
        check_one_of(granularity, GRANULARITIES, f"{where}.granularity")
        return granularity
    said = granularity if isinstance(granularity[0], (list, tuple)) else [granularity]
    block, place, fill = (*said, *("front", None)[len(said) - 1 :])
    if shape is None or not all(isinstance(size, int) for size in block) or len(block) > len(shape):
        return "blocks"
    padding = [(1 if place == "front" else -1) if fill is None else fill] * (len(shape) - len(block))
    block = [*padding, *block] if place == "front" else [*block, *padding]
    whole = [size in (-1, extent) for size, extent in zip(block, shape, strict=True)]
    if all(whole):
        return "default"
    return "out_channel" if all(whole[1:]) and block[0] == 1 else "blocks"


def _fused(
    modules: Mapping[str, nn.Module], groups: Iterable[Any], where: str
) -> dict[str, tuple[str | None, str | None]]:
    """(norm or None, clamp or None) by the path of the layer that they belong to."""
    found = {}
    for i, group in enumerate(groups):
        here = f"{where}[{i}]"
        if not isinstance(group, (list, tuple)) or not 2 <= len(group) <= 3:
            raise InvalidArgument(f"{here}: must be (layer, norm), (layer, activation) or all three, got {group!r}")
        with_names(modules, group, here)
        layer, *rest = group
        if not isinstance(modules[layer], WEIGHTED):
            kind = type(modules[layer]).__name__
            raise Unsupported(f"{here}: {layer} is a {kind}; only layers with weights are fused")
        norm = rest.pop(0) if isinstance(modules[rest[0]], nn.modules.batchnorm._BatchNorm) else None
        clamp = rest.pop(0) if rest else None
        if rest or (clamp is not None and not isinstance(modules[clamp], (nn.ReLU, nn.ReLU6, nn.Hardtanh))):
            raise InvalidArgument(f"{here}: only a BatchNorm and ReLU, ReLU6 or Hardtanh may follow; got {group!r}")
        found[layer] = (norm, clamp)
    return found
