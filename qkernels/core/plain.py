"""A copy of a model to work on: weights are plain Parameters, attention has a graph."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qkernels.core.attention import open_attention

_FORMULAS = (BasePruningMethod, WeightNorm, SpectralNorm)  # forward pre-hooks that compute a weight
_WEIGHT_NORM_HOOK = "weight_norm.<locals>._weight_norm_compat_hook"  # loads older states; cannot be pickled


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode. Weights given by formulas (pruning, weight and spectral normalization) have their values."""
    computed = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
    work = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed}).eval()
    for module in work.modules():
        _bake_hooks(module)
        _bake_parametrizations(module)
    return open_attention(work)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs code of its user's, which may change what comes in or goes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_pruned(model: nn.Module) -> bool:
    return any(isinstance(hook, BasePruningMethod) for m in model.modules() for _, hook in _formulas(m))


def is_reparametrized(model: nn.Module) -> bool:
    """Whether a weight is given by a formula other than pruning."""
    return any(
        parametrize.is_parametrized(m) or any(not isinstance(hook, BasePruningMethod) for _, hook in _formulas(m))
        for m in model.modules()
    )


@torch.no_grad()
def compute_formulas(model: nn.Module) -> None:
    """Computes anew what forward pre-hooks give, as the next forward in eval mode will: a step may lie in between."""
    for module in model.modules():
        for _, hook in _formulas(module):
            training, module.training = module.training, False
            hook(module, ())
            module.training = training


def _formulas(module: nn.Module) -> list[tuple[int, Any]]:
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _FORMULAS)]


def _bake_hooks(module: nn.Module) -> None:
    for key, hook in _formulas(module):
        name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        trains = any(p.requires_grad for other, p in module._parameters.items() if other.startswith(f"{name}_"))
        hook.remove(module)
        module._parameters[name].requires_grad_(trains)
        del module._forward_pre_hooks[key]


def _bake_parametrizations(module: nn.Module) -> None:
    """`torch.nn.utils.parametrize.remove_parametrizations` would also change the class, which the original shares."""
    if parametrize.is_parametrized(module):
        values = {
            name: nn.Parameter(getattr(module, name).detach(), any(p.requires_grad for p in formula.parameters()))
            for name, formula in module.parametrizations.items()
        }
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook.hook, "__qualname__", "") == _WEIGHT_NORM_HOOK:
                del module._load_state_dict_pre_hooks[key]
        for name, value in values.items():
            module.register_parameter(name, value)
