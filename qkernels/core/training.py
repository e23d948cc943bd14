"""`prepare_qat` and the phases of training: what is watched, rounded and frozen, and when."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qkernels.core.exact_forward import link
from qkernels.core.expect import (
    expect_batches,
    expect_float,
    expect_module,
    expect_options,
    warn_without_quantizers,
)
from qkernels.core.norm import Freezable, make_freezable
from qkernels.core.phases import run_batch, runner
from qkernels.core.plain import is_pruned, is_reparametrized
from qkernels.core.prepare import PreparedModel, prepare_model, prepared_layers, quantizers
from qkernels.core.quantizer import ROUNDING, Quantizer, State
from qkernels.core.recipe import OPTIONS, Recipe, make_recipe
from qkernels.core.rules import RULES
from qkernels.errors import InvalidArgument, InvalidState, InvalidType

FORWARDS = ("int8", "float")


def prepare_qat(
    model: nn.Module,
    example_inputs: Any,
    recipe: "str | Recipe" = "int8",
    rule: str | None = None,
    forward: str = "int8",
    start_step: int = 0,
    **options: Any,
) -> nn.Module:
    """A copy of `model`, in training mode, that trains with quantized weights and activations.

    Everything that follows calibration also follows training: `exact`, `verify`, `convert`, `save`, with the model in
    eval mode or not. Batch normalization is folded for good by `convert`; until then it is trained as part of the layer
    before it. The parameters are new objects: make the optimizer from the returned model.

    Args:
        model: a float32 module, trained or not.
        example_inputs: as for `prepare`.
        recipe: a name, or a `Recipe`. By name, activation ranges follow a moving average instead of a histogram, and
            weight ranges that are observed at every step the extremes instead of a search for the least error.
        rule: how grids are trained (see docs/training.md); None: as the recipe says, which is "ste" unless told.
        forward: "int8": convolutions and linear layers run on the integer kernels in the forward where they have
            one; "float": everything is simulated in float.
        start_step: for so many training steps the quantizers of activations and weights only watch.
        **options: changes to the recipe, as for `prepare`.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as `prepare`; also where the recipe cannot be trained.
        InvalidState: it is called in `torch.inference_mode()`.

    >>> import qkernels
    >>> model = qkernels.prepare_qat(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(2, 4))
    >>> model(torch.randn(8, 4)).sum().backward()
    >>> converted = qkernels.convert(model)
    """
    expect_float("prepare_qat", model)
    if torch.is_inference_mode_enabled():
        raise InvalidState("prepare_qat: call it outside of torch.inference_mode(), whose tensors cannot be trained")
    if forward not in FORWARDS:
        raise InvalidArgument(f"prepare_qat: forward must be one of {list(FORWARDS)}, got {forward!r}")
    if is_pruned(model):
        warnings.warn(
            "prepare_qat: the masks of torch.nn.utils.prune are applied once; training may fill pruned weights again",
            stacklevel=2,
        )
    if is_reparametrized(model):
        warnings.warn(
            "prepare_qat: weights of weight_norm, spectral_norm and other parametrizations are computed once; training "
            "changes the weights themselves and may leave what the formula kept",
            stacklevel=2,
        )
    if not isinstance(start_step, int) or start_step < 0:
        raise InvalidArgument(f"prepare_qat: start_step must be a number of steps, got {start_step!r}")
    expect_options("prepare_qat", options, (*OPTIONS, "forward", "start_step"))
    recipe = (
        _training_recipe(recipe, rule, options)
        if isinstance(recipe, str)
        else make_recipe(recipe, rule=rule, **options)
    )
    prepared = prepare_model(model, example_inputs, recipe, trained=True)
    prepared.apply(make_freezable)
    if forward == "int8":
        for part in prepared.modules():
            if isinstance(part, PreparedModel):
                link(part)
    for layer in prepared_layers(prepared):
        layer.choose_weight_grid()
    _warn_of_unsettled_norms(prepared)
    for quantizer in quantizers(prepared):
        quantizer.state = State.TRAIN
        quantizer.delay = start_step
    return prepared.train()


def _warn_of_unsettled_norms(prepared: nn.Module) -> None:
    """A learned grid of a folded weight is chosen now, and goes by the running statistics that the fold takes."""
    found = [
        layer.quantizers["weight"].source
        for layer in prepared_layers(prepared)
        if layer.norm is not None
        and layer.norm.num_batches_tracked is not None
        and layer.norm.num_batches_tracked == 0
        and not layer.quantizers["weight"].rule.observes
        and not layer.grid_is_on_weight()
    ]
    if found:
        warnings.warn(
            f"prepare_qat: the batch norms behind {', '.join(found[:3])} have seen no batch yet, and the learned grids "
            "of these weights would not follow their statistics: train in float first, or take weight_granularity="
            "'per_channel'",
            stacklevel=3,
        )


def _training_recipe(name: str, rule: str | None, options: dict[str, Any]) -> Recipe:
    """The recipe `name` with observers that are cheap enough for every step."""
    recipe = make_recipe(name, rule=rule, **{"observer": "moving_average", **options})
    if "weight_observer" in options or not RULES[recipe.weight.rule].observes:
        return recipe
    return replace(recipe, weight=replace(recipe.weight, observer="minmax", options=()))


# --- phases ----------------------------------------------------------------------------------------------------------
# Each function works on a whole model and under `model.apply`; called for a model without Quantizers, it warns.

_WATCHES = {State.FAKE_QUANT: State.TRAIN, State.OFF: State.OBSERVE}
_IGNORES = {State.TRAIN: State.FAKE_QUANT, State.OBSERVE: State.OFF}
_ROUNDS = {State.OBSERVE: State.TRAIN, State.OFF: State.FAKE_QUANT, State.FROZEN_OFF: State.FROZEN}
_PASSES = {State.TRAIN: State.OBSERVE, State.FAKE_QUANT: State.OFF, State.FROZEN: State.FROZEN_OFF}


def _move(model: nn.Module, moves: dict[State, State]) -> None:
    for quantizer in quantizers(model):
        quantizer.state = moves.get(quantizer.state, quantizer.state)


def enable_observer(model: nn.Module) -> None:
    """Grids follow the data (or are learned) again; frozen ones stay."""
    warn_without_quantizers("enable_observer", model)
    _move(model, _WATCHES)


def disable_observer(model: nn.Module) -> None:
    """Grids stay as they are. Learned scales are Parameters: exclude them from the optimizer to stop those."""
    warn_without_quantizers("disable_observer", model)
    _move(model, _IGNORES)


def enable_fake_quant(model: nn.Module) -> None:
    """Tensors are rounded again: to their grids, or, where observers went on, to those of what passed meanwhile.

    Learned grids stay as they were: where much has changed meanwhile, calibrate.
    """
    warn_without_quantizers("enable_fake_quant", model)
    for quantizer in quantizers(model):
        watched = quantizer.state is State.OBSERVE and quantizer.observer.has_data()
        if watched and (quantizer.rule is None or quantizer.rule.observes):
            quantizer.choose()
    _move(model, _ROUNDS)


def disable_fake_quant(model: nn.Module) -> None:
    """Tensors pass unchanged: the model computes in float. Observers go on, in eval mode too."""
    warn_without_quantizers("disable_fake_quant", model)
    _move(model, _PASSES)


def freeze(model: nn.Module) -> None:
    """Grids stay as they are, learned ones and those that are not in use too, also through calibration.

    A Quantizer that has no grid yet is left alone.
    """
    warn_without_quantizers("freeze", model)
    for quantizer in quantizers(model):
        if quantizer.has_grid():
            quantizer.state = State.FROZEN if quantizer.state in ROUNDING else State.FROZEN_OFF


def freeze_bn(model: nn.Module) -> None:
    """Batch normalizations use their running statistics and leave them alone; gamma and beta still train."""
    warn_without_quantizers("freeze_bn", model)
    for norm in norms(model):
        norm.frozen = True


def unfreeze_bn(model: nn.Module) -> None:
    """Batch normalizations use batch statistics in training, and update the running ones."""
    warn_without_quantizers("unfreeze_bn", model)
    for norm in norms(model):
        norm.frozen = False


def norms(model: nn.Module) -> Iterable[Freezable]:
    return (m for m in model.modules() if isinstance(m, Freezable))


@contextmanager
def phase(model: nn.Module, *changes: Callable[[nn.Module], None]) -> Iterator[nn.Module]:
    """Inside the block the model is as `changes` leave it; afterwards everything is as before.

    >>> import qkernels
    >>> model = qkernels.prepare_qat(torch.nn.Linear(4, 4), torch.randn(2, 4))
    >>> with qkernels.phase(model, qkernels.disable_fake_quant, qkernels.freeze_bn):
    ...     y = model(torch.randn(2, 4))
    """
    expect_module("phase", model)
    for change in changes:
        if not callable(change):
            raise InvalidType(f"phase: changes must be functions of a model, such as qkernels.freeze, got {change!r}")
    states = [(q, q.state) for q in quantizers(model)]
    frozen = [(norm, norm.frozen) for norm in norms(model)]
    try:
        for change in changes:
            change(model)
        yield model
    finally:
        for quantizer, state in states:
            quantizer.state = state
        for norm, was in frozen:
            norm.frozen = was


@torch.no_grad()
def reestimate_bn(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Replaces the running statistics of every batch normalization by the mean over `batches`, on quantized weights.

    Worth doing at the end of training below 8 bits, where the moving statistics lag behind weights that jump between
    codes. Grids stay as they are.

    Args:
        model: from `prepare_qat`.
        batches, forward: as for `calibrate`.

    Raises:
        InvalidArgument: the model has no batch normalization, or there is no batch.
        InvalidType: `batches` is one tensor or dict or no iterable, or a batch holds no tensor.
    """
    expect_module("reestimate_bn", model)
    expect_batches("reestimate_bn", batches)
    run = runner("reestimate_bn", forward)
    found = list(norms(model))
    if not found:
        raise InvalidArgument(
            "reestimate_bn: the model must come from `prepare_qat`, and have batch normalizations; this "
            f"{type(model).__name__} has none"
        )
    with phase(model, disable_observer, unfreeze_bn):
        average_statistics(model, found, batches, run)
    return model


@torch.no_grad()
def average_statistics(
    model: nn.Module,
    found: Sequence[nn.Module],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Replaces the running statistics of the batch normalizations `found` by the mean over `batches`.

    Until the end all batches pass under the old ones, which the grids of weights belong to. One that no batch reaches
    keeps them. If something fails, everything is as before.

    Raises:
        InvalidArgument: there is no batch.
    """
    found = [norm for norm in found if norm.running_mean is not None]
    before = [(norm, norm.training, norm.momentum) for norm in found]
    statistics = running_statistics(found)
    sums: dict[nn.Module, list[torch.Tensor]] = {}
    counts: Counter[nn.Module] = Counter()

    def take(norm: nn.Module, inputs: Any, output: Any) -> None:
        """Torch has put the statistics of the batch in the place of the running ones: here is where they are wanted."""
        seen = [norm.running_mean.double(), norm.running_var.double()]
        sums[norm] = [total + new for total, new in zip(sums[norm], seen, strict=True)] if norm in sums else seen
        counts[norm] += 1
        restore({buffer: statistics[buffer] for buffer in norm.buffers(recurse=False)})

    hooks = [norm.register_forward_hook(take) for norm in found]
    try:
        for norm in found:
            norm.momentum = 1.0
            norm.train()
        nothing = True
        for batch in batches:
            (forward or run_batch)(model, batch)
            nothing = False
        if nothing:
            raise InvalidArgument("reestimate_bn: batch normalizations cannot be estimated from no batches")
        for norm, (mean, var) in sums.items():
            norm.running_mean.copy_(mean / counts[norm])
            norm.running_var.copy_(var / counts[norm])
            norm.num_batches_tracked.fill_(counts[norm])
    except BaseException:
        restore(statistics)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for norm, training, momentum in before:
            norm.training, norm.momentum = training, momentum


def running_statistics(found: Iterable[nn.Module]) -> dict[torch.Tensor, torch.Tensor]:
    """The buffers of the batch normalizations `found`, each with a copy of what it holds; for `restore`."""
    return {buffer: buffer.clone() for norm in found for buffer in norm.buffers(recurse=False)}


@torch.no_grad()
def restore(statistics: dict[torch.Tensor, torch.Tensor]) -> None:
    for buffer, value in statistics.items():
        buffer.copy_(value)


def trained_quantizers(model: nn.Module) -> Iterable[Quantizer]:
    return (q for q in quantizers(model) if q.rule is not None)
