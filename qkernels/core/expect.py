"""The checks of arguments that verbs share: each error names the verb, the argument, what it is and what it must be."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qkernels.core.graph import NetworkGraph
from qkernels.core.quantizer import Quantizer
from qkernels.core.registry import is_layer
from qkernels.core.report import PrepareReport
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, close_matches

_NO_TENSORS = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic)
INPUTS = "a tensor, a tuple or list of arguments or a dict of keyword arguments"


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _has(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> bool:
    return any(wanted(module) for module in model.modules())


def _is_quantizer(module: nn.Module) -> bool:
    return isinstance(module, Quantizer)


# --- models ----------------------------------------------------------------------------------------------------------


def expect_module(verb: str, model: Any, name: str = "model") -> None:
    if not isinstance(model, nn.Module):
        raise InvalidType(f"{verb}: {name} must be a torch.nn.Module, got {_kind(model)}")


def expect_float(verb: str, model: Any) -> None:
    """A model with a Python forward, as nobody has prepared it yet."""
    expect_module(verb, model)
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidType(
            f"{verb}: model is a TorchScript module, which has no Python forward: give the original module"
        )
    if _has(model, _is_quantizer):
        raise InvalidArgument(f"{verb}: the model is prepared already")
    if _has(model, is_layer):
        raise InvalidArgument(f"{verb}: the model is converted already: give the float model")


def expect_prepared(verb: str, model: Any, itself: bool = False) -> None:
    """What `prepare` or `prepare_qat` returned; unless `itself`, also a module around it."""
    expect_module(verb, model)
    if not _has(model, _is_quantizer):
        if _has(model, is_layer):
            raise InvalidArgument(f"{verb}: the model must come from `prepare`, got one that is converted already")
        if not (_is_reported(model) or _has(model, lambda module: isinstance(module, NetworkGraph))):
            raise InvalidArgument(f"{verb}: the model must come from `prepare`, got a {type(model).__name__}")
    if itself and not _is_reported(model):
        raise InvalidArgument(
            f"{verb}: the model must come from `prepare`, got a {type(model).__name__} around such a model"
        )


def _is_reported(model: nn.Module) -> bool:
    return isinstance(getattr(model, "report", None), PrepareReport)


def expect_calibrated(verb: str, model: Any) -> None:
    """What `prepare` returned, or a module around it, where each Quantizer has its grid."""
    expect_prepared(verb, model)
    found = [module for module in model.modules() if _is_quantizer(module)]
    missing = [quantizer.source for quantizer in found if not quantizer.has_grid()]
    if missing:
        raise InvalidState(
            f"{verb}: {len(missing)} of {len(found)} Quantizers have no grid ({', '.join(missing[:3])}, ...); run "
            "batches through the model inside `with qkernels.calibrating(prepared):` first"
        )


def expect_converted(verb: str, model: Any) -> None:
    """What `convert` or `load` returned; a network that stayed float has nothing that it could be told by."""
    expect_module(verb, model, "converted")
    if _has(model, _is_quantizer):
        raise InvalidArgument(f"{verb}: converted must come from `convert` or `load`, got a model that is prepared")


def warn_without_quantizers(verb: str, model: Any) -> None:
    """Warns of a model on which a phase does nothing, unless `model.apply` has called for it: that visits every part.

    Observers of the protocol of torch.ao count as Quantizers.
    """
    expect_module(verb, model)
    if _has(model, lambda module: _is_quantizer(module) or hasattr(module, "calculate_qparams")):
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.apply.__code__:
            return
        frame = frame.f_back
    warnings.warn(
        f"{verb}: nothing changes, for there is no Quantizer in this {type(model).__name__}: give what `prepare` or "
        "`prepare_qat` returned",
        stacklevel=3,
    )


# --- data ------------------------------------------------------------------------------------------------------------


def expect_batches(verb: str, batches: Any) -> None:
    """An iterable of batches; one tensor would be taken apart into its rows, and a dict into its keys."""
    if isinstance(batches, (Tensor, Mapping)):
        one, name = ("tensor", "x") if isinstance(batches, Tensor) else (_kind(batches), "batch")
        raise InvalidType(f"{verb}: batches must be an iterable of batches, got one {one}; write [{name}]")
    if not isinstance(batches, Iterable):
        raise InvalidType(f"{verb}: batches must be an iterable of inputs, got {batches!r}")


def expect_inputs(verb: str, inputs: Any, name: str = "a batch") -> None:
    """What a model can be called with. An object of another class may hold tensors, as far as anybody knows."""
    leaves = tree_leaves(inputs)
    if leaves and all(isinstance(leaf, _NO_TENSORS) for leaf in leaves):
        got = repr(inputs) if isinstance(inputs, (bool, int, float, complex, type(None))) else _kind(inputs)
        without = " without a tensor" if isinstance(inputs, (tuple, list, dict)) else ""
        raise InvalidType(f"{verb}: {name} must be {INPUTS}, got {got}{without}")


def expect_runs(verb: str, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """A model that takes its example. It is called once: for when something has failed already."""
    try:
        with torch.no_grad():
            model(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs)))
    except Exception as error:  # forward is foreign code
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InvalidArgument(
            f"{verb}: the model does not run on example_inputs: {type(error).__name__}: {reason}"
        ) from error


# --- options ---------------------------------------------------------------------------------------------------------


def expect_options(verb: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Keyword arguments of these names only."""
    known = tuple(known)
    for name in options:
        if name not in known:
            raise InvalidArgument(f"{verb}: unknown option {name!r}{close_matches(name, known)}")
