"""NNI's `config_list` (API of 3.0): which targets of which modules get which grid. The first entry of a target wins."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qkernels.core.attach import PARAMETERS, Site
from qkernels.core.blocks import counts
from qkernels.core.qspec import MAX_BITS, QSpec
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported, close_matches
from qkernels.frontends.common import (
    WEIGHTED,
    check_keys,
    check_one_of,
    check_words,
    first_names,
    with_names,
    with_types,
)

TYPES = (*WEIGHTED, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.MaxPool2d)
SELECTING = ("op_names", "op_names_re", "op_types")
SETTINGS = ("quant_dtype", "quant_scheme", "granularity", "apply_method")
LEGACY = ("quant_types", "quant_bits", "quant_start_step", "op_partial_names", "exclude")
EXCLUDING = tuple(f"exclude_{key}" for key in SELECTING)
KEYS = (*SELECTING, *EXCLUDING, *SETTINGS, "target_names", "target_settings", "fuse_names", *LEGACY)
PREFIXES = ("_input_", "_output_")
LEGACY_TARGETS = {"weight": "weight", "input": "_input_", "output": "_output_"}
GRANULARITIES = {"default": None, "out_channel": (1, 0), "in_channel": (-1, 1, 0), "per_channel": (-1, 1, 0)}  # blocks
METHODS = (None, "bypass", "clamp_round", "qat_clamp_round")
DEFAULTS = {"quant_dtype": "int8", "quant_scheme": None, "granularity": "default"}
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Setting:
    """The settings of one target; scheme is "affine", "symmetric" or None.

    `rank`: a granularity that comes to one grid for the whole tensor has a scale of so many dimensions, all 1.
    """

    bits: int = 8
    signed: bool = True
    scheme: str | None = None
    per_channel: bool = False
    block: tuple[int, ...] | None = None
    rank: int = 0

    def spec(self, is_parameter: bool) -> QSpec:
        kind = {"symmetric": self.scheme != "affine", "per_channel": self.per_channel, "min_scale": EPS}
        return QSpec.even(self.bits, self.signed, is_parameter, block=self.block, **kind)


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
            if "weight" not in recipes:
                norm, clamp = None, clamp or norm  # nothing to fold into: it stays, and the output is that behind it
            output = recipes.get("_output_0")
            if clamp is not None and output is not None:
                found[clamp] = Site(output=output, start_step=start_step)
                output = None
            how = {"folds": True, "start_step": start_step, "bias": recipes.get("bias")}
            found[path] = Site(inputs, output, recipes.get("weight"), norm, **how)
        return found

    def layer(self, path: str) -> str:
        """The layer that the module at `path` is fused with, whose output it rounds; otherwise `path`."""
        return next((layer for layer, parts in self.fused.items() if path in parts), path)


def parse(model: nn.Module, config_list: Iterable[Mapping[str, Any]]) -> Settings:
    """Checks every key and every name, and says which module gets what.

    Raises:
        InvalidArgument: with the path of the key, such as `config_list[1].target_settings.weight.granularity`.
        Unsupported: a documented form that has no counterpart here.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise InvalidArgument(f"config_list: must be a list of dicts, got {config_list!r}")
    modules = {path: m for path, m in model.named_modules(remove_duplicate=False) if path}
    entries = [(f"config_list[{i}]", _modern(entry, f"config_list[{i}]")) for i, entry in enumerate(config_list)]
    excluded = {path for where, entry in entries if entry.get("exclude") for path in _selected(modules, entry, where)}
    targets: dict[str, dict[str, Setting]] = {}
    fused: dict[str, tuple[str | None, str | None]] = {}
    for where, entry in entries:
        if entry.get("exclude"):
            continue
        fused = _fused(modules, entry.get("fuse_names", ()), f"{where}.fuse_names") | fused
        chosen = _selected(modules, entry, where) - excluded
        for path in (path for path in modules if path in chosen):
            targets[path] = _targets(path, modules[path], entry, where) | targets.get(path, {})
    if not targets:
        raise InvalidArgument("config_list: no module is left to quantize")
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
    check_one_of(entry.get("exclude", False), (True, False), f"{where}.exclude")
    if "quant_start_step" in entry:
        raise Unsupported(f"{where}.quant_start_step: give it to the quantizer, QATQuantizer(..., quant_start_step=n)")
    if "op_partial_names" in entry:
        names, patterns = entry.pop("op_partial_names"), entry.get("op_names_re", [])
        check_words(names, f"{where}.op_partial_names")
        check_words(patterns, f"{where}.op_names_re")
        entry["op_names_re"] = [*patterns, *(f".*{re.escape(name)}.*" for name in names)]
    types, bits = entry.pop("quant_types", None), entry.pop("quant_bits", None)
    if (types is None) != (bits is None):
        raise InvalidArgument(f"{where}: quant_types and quant_bits belong together")
    if types is not None:
        for key in (key for key in ("quant_dtype", "target_names", "target_settings") if key in entry):
            raise InvalidArgument(f"{where}.{key}: not with quant_types, which says the same in the words of 2.x")
        check_words(types, f"{where}.quant_types")
        widths = bits if isinstance(bits, Mapping) else dict.fromkeys(types, bits)
        check_keys(widths, LEGACY_TARGETS, f"{where}.quant_bits")
        for name in types:
            check_one_of(name, LEGACY_TARGETS, f"{where}.quant_types")
            if not isinstance(widths.get(name), int) or not 2 <= widths[name] <= MAX_BITS:
                raise InvalidArgument(f"{where}.quant_bits: must be from 2 to {MAX_BITS} for {name}, got {bits!r}")
        own = {LEGACY_TARGETS[name]: {"quant_dtype": f"int{widths[name]}"} for name in types}
        entry |= {"target_names": list(own), "target_settings": own}
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
    by_name = entry.get("op_names") or entry.get("op_names_re")
    chosen = named & of_type if by_name and entry.get("op_types") else named | of_type
    chosen = chosen.difference(*said("exclude_"))
    if not chosen:
        raise InvalidArgument(f"{where}: selects no module of the model")
    return chosen


def _matching(modules: Mapping[str, nn.Module], patterns: Iterable[str], where: str) -> set[str]:
    check_words(patterns, where)
    try:
        hits = {pattern: {path for path in modules if re.match(pattern, path)} for pattern in patterns}
    except re.error as error:
        raise InvalidArgument(f"{where}: {error.pattern!r} is no regular expression: {error}") from None
    for pattern in (pattern for pattern, paths in hits.items() if not paths):
        raise InvalidArgument(f"{where}: no module of the model matches {pattern!r}")
    return first_names(modules, set().union(*hits.values()))


def _targets(path: str, module: nn.Module, entry: Mapping[str, Any], where: str) -> dict[str, Setting]:
    if not isinstance(module, TYPES):
        kinds = [cls.__name__ for cls in TYPES]
        raise InvalidArgument(f"{where}: {path} is a {type(module).__name__}; targets are known for {kinds}")
    names = entry.get("target_names") or ["_input_", *PARAMETERS, "_output_"]
    own = entry.get("target_settings", {})
    check_words(names, f"{where}.target_names")
    check_keys(own, own, f"{where}.target_settings")
    keys: dict[str, str] = {}
    for key in own:
        here = f"{where}.target_settings"
        check_keys(own[key], SETTINGS, f"{here}.{key}")
        target = key if key in PREFIXES else _canonical(key, path, module, here)
        if keys.setdefault(target, key) != key:
            raise InvalidArgument(f"{here}: {target} of {path} has two settings, {keys[target]!r} and {key!r}")
    targets = dict.fromkeys(_canonical(name, path, module, f"{where}.target_names") for name in names)
    for key in (key for target, key in keys.items() if not any(t.startswith(target) for t in targets)):
        raise InvalidArgument(f"{where}.target_settings.{key}: is no target of {path}; there are {list(targets)}")
    found = {}
    for target in targets:
        if target in PARAMETERS and getattr(module, target, None) is None:
            continue
        key = keys.get(target, keys.get(target.rstrip("0123456789")))
        said = own.get(key, {})
        places = {name: f"{where}.target_settings.{key}" if name in said else where for name in SETTINGS}
        common = {name: entry[name] for name in SETTINGS if name in entry}
        found[target] = _setting({**common, **said}, target, module, places)
    if not found:
        raise InvalidArgument(f"{where}.target_names: {path} is a {type(module).__name__} and has none of {names}")
    return found


def _canonical(name: str, path: str, module: nn.Module, where: str) -> str:
    """`weight`, `bias`, `_input_0`, ... or `_output_0`."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None and name not in PARAMETERS:
        known = [*PARAMETERS, "_input_", "_input_0", "_output_", "_output_0"]
        raise InvalidArgument(f"{where}: unknown target {name!r}{close_matches(name, known)}")
    if prefix is None or name == "_output_0":
        return name
    which = name.removeprefix(prefix)
    if prefix == "_output_":
        if which:
            raise Unsupported(f"{where}: {name}: modules with several outputs cannot be split; use _output_0")
        return "_output_0"
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    numbers = [str(i) for i in range(len(arguments))]
    if which not in ("", *arguments, *numbers):
        raise InvalidArgument(f"{where}: {path} has no argument {which!r}; there are {arguments}")
    return f"_input_{arguments.index(which) if which in arguments else which or 0}"


def _setting(entry: Mapping[str, Any], target: str, module: nn.Module, places: Mapping[str, str]) -> Setting:
    said = {key: value for key, value in entry.items() if value is not None}
    dtype, scheme, given = (said.get(key, default) for key, default in DEFAULTS.items())
    where = {key: f"{place}.{key}" for key, place in places.items()}
    match = re.fullmatch(r"(u?)int([1-9]\d*)", dtype) if isinstance(dtype, str) else None
    if match is None:
        raise InvalidArgument(f"{where['quant_dtype']}: must be None, int{{N}} or uint{{N}}, got {dtype!r}")
    bits = int(match[2])
    if not 2 <= bits <= MAX_BITS:
        bounds = f"there are grids of 2 to {MAX_BITS} bits; leave the target out"
        raise Unsupported(f"{where['quant_dtype']}: {dtype}: {bounds}")
    check_one_of(scheme, ("affine", "symmetric", None), where["quant_scheme"])
    check_one_of(entry.get("apply_method"), METHODS, where["apply_method"])
    shape = getattr(module, target).shape if target in PARAMETERS else None
    rank = _rank(module) if shape is None else len(shape)
    block = _block(given, shape, rank, where["granularity"])
    if block is None and given != "default":
        return Setting(bits, not match[1], scheme, rank=rank or 0)
    if block is None or block == (1, 0):
        return Setting(bits, not match[1], scheme, block is not None)
    return Setting(bits, not match[1], scheme, True, block)


def _block(given: Any, shape: Sequence[int] | None, rank: int | None, where: str) -> tuple[int, ...] | None:
    """The block of a granularity, as in `qkernels.core.blocks`: None is the whole tensor, (1, 0) a grid a channel.

    `shape` is that of a parameter; inputs and outputs have None, and a number of dimensions only for some modules.
    """
    if not isinstance(given, (list, tuple)):
        check_one_of(given, list(GRANULARITIES), where)
        if given != "default" and (given == "per_channel") != (shape is None):
            kind = "inputs and outputs" if given == "per_channel" else "parameters"
            raise InvalidArgument(f"{where}: {given!r} is for {kind}")
        return _checked(GRANULARITIES[given], shape, where)
    said = given if given and isinstance(given[0], (list, tuple)) else [given]
    sizes, place, fill = (*said[:3], *("front", 1)[len(said) - 1 :])
    fill = 1 if fill is None else fill
    numbers = (*sizes, fill)
    if not sizes or len(said) > 3 or not all(isinstance(n, int) and (n > 0 or n == -1) for n in numbers):
        form = "sizes that are positive or -1, or (sizes, 'front' or 'back', a size for the other dimensions)"
        raise InvalidArgument(f"{where}: must be {form}, got {given!r}")
    check_one_of(place, ("front", "back"), f"{where}[1]")
    if rank is None:
        if (place, fill) != ("back", -1):
            raise Unsupported(f"{where}: {given!r} depends on the dimensions of the tensor; say [{sizes}, 'back', -1]")
        return _checked((*sizes, 0), shape, where)
    padding = [fill] * (rank - len(sizes))
    return _checked(tuple([*padding, *sizes] if place == "front" else [*sizes, *padding]), shape, where)


def _checked(block: tuple[int, ...] | None, shape: Sequence[int] | None, where: str) -> tuple[int, ...] | None:
    """In its shortest form, after a look whether a parameter of `shape` has such blocks."""
    if block is None:
        return None
    grids = None if shape is None else counts(shape, block, where)
    if set(block) <= {-1, 0} or (grids is not None and math.prod(grids) == 1):
        return None
    return (1, 0) if grids is not None and grids[0] == shape[0] and math.prod(grids) == shape[0] else block


def _rank(module: nn.Module) -> int | None:
    """How many dimensions inputs and outputs have, where the class says so."""
    dims = re.search("([123])d$", type(module).__name__)
    return None if dims is None or isinstance(module, nn.BatchNorm1d) else int(dims[1]) + 2


def _fused(
    modules: Mapping[str, nn.Module], groups: Iterable[Any], where: str
) -> dict[str, tuple[str | None, str | None]]:
    """(norm or None, clamp or None) by the path of the layer that they belong to."""
    if not isinstance(groups, (list, tuple)):
        raise InvalidArgument(f"{where}: must be a list of tuples of names, got {groups!r}")
    found: dict[str, tuple[str | None, str | None]] = {}
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
        if found.setdefault(layer, (norm, clamp)) != (norm, clamp):
            raise InvalidArgument(f"{here}: {layer} is fused with {found[layer]} already")
    return found
