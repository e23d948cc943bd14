"""The phases of a prepared model: calibration, as a context manager and as a loop."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qkernels.core.adaround import learn_rounding
from qkernels.core.bias import correct_bias
from qkernels.core.corrections import AdaRound, BiasCorrection
from qkernels.core.expect import expect_batches, expect_inputs, expect_prepared
from qkernels.core.graph import batch_arguments
from qkernels.core.observers import is_distributed
from qkernels.core.prepare import prepared_layers, quantizers
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.samples import Samples
from qkernels.errors import CalibrationError, InvalidType

CORRECT = {BiasCorrection: correct_bias, AdaRound: learn_rounding}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is in eval mode; at the end, however it comes, each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def calibrating(prepared: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model runs in float, in eval mode, and every Quantizer watches; at its end grids are chosen.

    Each block starts from nothing seen. Afterwards the model computes with fake-quantized weights and activations. If
    the block ends by an exception (or Ctrl-C), everything is as before. Frozen Quantizers keep their grid throughout.
    What the recipe asks for against rounding errors (`Recipe.corrections`) is done at the end of the block too, on
    the first inputs seen in it.

    >>> import qkernels
    >>> prepared = qkernels.prepare(torch.nn.Linear(4, 4), torch.randn(2, 4))
    >>> with qkernels.calibrating(prepared):
    ...     for _ in range(10):
    ...         _ = prepared(torch.randn(8, 4))
    """
    expect_prepared("calibrating", prepared, itself=True)
    with evaluating(prepared), _watching(prepared):  # batch norms of a model in training keep their statistics
        yield prepared


@contextmanager
def _watching(prepared: nn.Module) -> Iterator[None]:
    """`calibrating` but for the modes."""
    watched = [q for q in quantizers(prepared) if q.state not in (State.FROZEN, State.FROZEN_OFF)]
    layers = [layer for layer in prepared_layers(prepared) if layer.quantizers["weight"] in set(watched)]
    weights = {layer.quantizers["weight"] for layer in layers}
    wanted = prepared.recipe.corrections if layers else ()
    samples = Samples(max((correction.samples for correction in wanted), default=0))
    before = [_snapshot(q) for q in watched]
    corrections = {correction: correction.clone() for layer in layers for correction in layer.corrections().values()}
    hook = prepared.register_forward_pre_hook(samples, with_kwargs=True)
    try:
        for quantizer in watched:
            quantizer.observer.reset()
            quantizer.state = State.OFF if quantizer in weights else State.OBSERVE
        with torch.no_grad():
            yield
            for layer in layers:
                layer.observe_weight()
        hook.remove()
        for quantizer in watched:
            if is_distributed() and quantizer not in weights:
                quantizer.observer.merge()
            quantizer.choose()
        for quantizer, (state, _) in zip(watched, before, strict=True):
            quantizer.state = State.TRAIN if state is State.TRAIN else State.FAKE_QUANT
        for correction in corrections:
            correction.zero_()
        if wanted and samples.count == 0:
            raise CalibrationError(
                f"calibration: {', '.join(c.name for c in wanted)} needs inputs of the model; call the prepared model "
                "itself inside `calibrating`, not its parts"
            )
        for correction in wanted:
            CORRECT[type(correction)](prepared, layers, samples, correction)
    except BaseException:
        for quantizer, (state, tensors) in zip(watched, before, strict=True):
            quantizer.load_state_dict(tensors)
            quantizer.state = state
        for correction, old in corrections.items():
            correction.copy_(old)
        raise
    finally:
        hook.remove()


@contextmanager
def simulating(prepared: nn.Module) -> Iterator[None]:
    """Inside, a calibrated model is in eval mode and every Quantizer rounds to its grid, whatever its state."""
    states = {quantizer: quantizer.state for quantizer in quantizers(prepared)}
    try:
        for quantizer in states:
            quantizer.state = State.FROZEN
        with evaluating(prepared):
            yield
    finally:
        for quantizer, state in states.items():
            quantizer.state = state


def observe(prepared: nn.Module) -> None:
    """From now on the model runs in float and every Quantizer watches, until `settle`: calibration without a block."""
    weights = {layer.quantizers["weight"] for layer in prepared_layers(prepared)}
    for quantizer in quantizers(prepared):
        quantizer.observer.reset()
        quantizer.state = State.OFF if quantizer in weights else State.OBSERVE


def settle(prepared: nn.Module) -> None:
    """Chooses grids for what was watched since `observe`."""
    with torch.no_grad():
        for layer in prepared_layers(prepared):
            layer.observe_weight()
    for quantizer in quantizers(prepared):
        quantizer.choose()
        quantizer.state = State.FAKE_QUANT


def _snapshot(quantizer: Quantizer) -> tuple[State, dict[str, Any]]:
    return quantizer.state, {name: t.clone() for name, t in quantizer.state_dict().items()}


def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """Runs `batches` through the model inside `calibrating`, with a progress bar if there is a terminal.

    Args:
        prepared: what `prepare` returned.
        batches: an iterable of batches: tensors, tuples or lists of arguments, or dicts of keyword arguments. From a
            loader with labels take the inputs: `(images for images, _ in loader)`.
        forward: how to run one batch, `forward(model, batch)`, if it is not one call of the model.

    Raises:
        InvalidArgument: the model does not come from `prepare`, or a batch does not fit its forward.
        InvalidType: `batches` is one tensor or dict or no iterable, or a batch holds no tensor.
        CalibrationError: there is no batch, or NaN or an infinity in what was seen.
    """
    expect_prepared("calibrate", prepared, itself=True)
    expect_batches("calibrate", batches)
    run = runner("calibrate", forward)
    with calibrating(prepared):
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=None):
            run(prepared, batch)
    return prepared


def non_finite_counts(prepared: nn.Module) -> dict[str, tuple[int, int]]:
    """How many NaN and infinities each Quantizer left out since its observer began, by the source of the tensor.

    Those that saw none are not listed. Made for models prepared with `non_finite="ignore"`.
    """
    expect_prepared("non_finite_counts", prepared)
    counts = {
        q.source: tuple(q.observer.non_finite.tolist())
        for q in quantizers(prepared)
        if q.observer.non_finite is not None
    }
    return {source: count for source, count in counts.items() if any(count)}


def runner(verb: str, forward: Callable[[nn.Module, Any], Any] | None) -> Callable[[nn.Module, Any], Any]:
    """How to run one batch: as asked for, or by one call of the model."""
    if forward is None:
        return partial(run_batch, verb=verb)
    if not callable(forward):
        raise InvalidType(f"{verb}: forward must be a function of the model and a batch, got {forward!r}")
    return forward


def run_batch(model: nn.Module, batch: Any, verb: str = "run_batch") -> Any:
    """Calls the model on a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    expect_inputs(verb, batch)
    args, kwargs = batch_arguments(model, batch)
    return model(*args, **kwargs)
