"""prepare_fx and convert_fx, and the QConfigMapping that they read."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from qkernels.core.convert import convert as core_convert
from qkernels.core.phases import observe, settle
from qkernels.core.prepare import PreparedModel, quantizers
from qkernels.core.prepare import prepare as core_prepare
from qkernels.core.quantizer import State
from qkernels.core.recipe import Match, Override, Recipe
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.torch_ao import parse
from qkernels.frontends.torch_ao.eager import check_qconfig, convert, override
from qkernels.frontends.torch_ao.observers import get_default_qat_qconfig, get_default_qconfig


class QConfigMapping:
    """Which module gets which qconfig: global, by type, by a regex of the path, by path; the latter win.

    A type is a class of modules, a function as the model calls it (`torch.add`; `operator.add` for `x + y`), or the
    name of a method of tensors.
    """

    def __init__(self) -> None:
        self.global_qconfig: Any = None
        self.object_type_qconfigs: dict[type | Callable | str, Any] = {}
        self.module_name_regex_qconfigs: dict[str, Any] = {}
        self.module_name_qconfigs: dict[str, Any] = {}

    def set_global(self, qconfig: Any) -> "QConfigMapping":
        self.global_qconfig = qconfig
        return self

    def set_object_type(self, object_type: type | Callable | str, qconfig: Any) -> "QConfigMapping":
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: Any) -> "QConfigMapping":
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name_object_type_order(self, *given: Any) -> None:
        raise Unsupported("QConfigMapping.set_module_name_object_type_order: give the module a path of its own")

    def set_module_name(self, module_name: str, qconfig: Any) -> "QConfigMapping":
        self.module_name_qconfigs[module_name] = qconfig
        return self


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    return QConfigMapping().set_global(get_default_qconfig(backend, version))


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))


def mapping_recipe(mapping: Any, verb: str = "mapping_recipe") -> Recipe:
    """The recipe that a QConfigMapping, ours or torch.ao's, says.

    Raises:
        InvalidArgument: a regex is none, or what should be a qconfig, or the mapping, is something else.
        Unsupported: rules for the n-th call of a type, a grid of more bits than there are, or a class of the user's.
    """
    if not hasattr(mapping, "module_name_qconfigs"):
        raise InvalidArgument(f"{verb}: qconfig_mapping must be a QConfigMapping, got {mapping!r}")
    if getattr(mapping, "module_name_object_type_order_qconfigs", None):
        raise Unsupported("QConfigMapping: module_name_object_type_order: give the module a path of its own")
    base = mapping.global_qconfig
    overrides: list[Override] = []
    for kind, qconfig in mapping.object_type_qconfigs.items():
        match = Match("type", kind) if isinstance(kind, str) else Match.of(kind)  # a method of tensors has its name
        overrides.append(override(match, qconfig))
    # In torch.ao the first regex that fits wins, in a Recipe the last rule.
    for pattern, qconfig in reversed(mapping.module_name_regex_qconfigs.items()):
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidArgument(f"QConfigMapping: {pattern!r} is no regular expression: {error}") from None
        overrides.append(override(Match("regex", pattern + r"[\s\S]*"), qconfig))
    for path, qconfig in mapping.module_name_qconfigs.items():
        overrides.append(override(Match("name", path), qconfig))
    if base is not None:
        check_qconfig(base, "QConfigMapping")
        activation, weight = parse.factory_recipe(base.activation), parse.factory_recipe(base.weight)
        return Recipe(activation, weight, tuple(overrides))
    return Recipe(overrides=(Override(Match("regex", r"[\s\S]*"), skip=True), *overrides))


def refuse(verb: str, **given: Any) -> None:
    """Arguments of torch's that have no counterpart."""
    for name, value in given.items():
        if value:
            raise Unsupported(
                f"{verb}: {name} has no counterpart: the core knows which operations are integer; leave modules and "
                "functions float by a qconfig of None (set_module_name, set_object_type)"
            )


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: Any,
    example_inputs: Any,
    prepare_custom_config: None = None,
    _equalization_config: None = None,
    backend_config: None = None,
) -> nn.Module:
    """The model with Quantizers that watch; then run calibration batches through it and call `convert_fx`."""
    refuse("prepare_fx", prepare_custom_config=prepare_custom_config, backend_config=backend_config)
    refuse("prepare_fx", _equalization_config=_equalization_config)
    prepared = core_prepare(model, example_inputs, mapping_recipe(qconfig_mapping, "prepare_fx"))
    observe(prepared)
    return prepared


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: None = None,
    backend_config: None = None,
) -> nn.Module:
    """The integer network of what `prepare_fx` gave, ours or torch.ao's."""
    refuse("convert_fx", convert_custom_config=convert_custom_config, qconfig_mapping=qconfig_mapping)
    refuse("convert_fx", backend_config=backend_config)
    if not isinstance(graph_module, PreparedModel):
        return convert(graph_module)
    if any(q.state is State.OBSERVE for q in quantizers(graph_module)):
        settle(graph_module)
    return core_convert(graph_module)
