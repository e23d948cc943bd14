"""`Attached`: a living model with Quantizers at its modules, from the first batch to the integer network."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qkernels.core.attach import WEIGHT, Originals, Site, as_prepared, attach, attached
from qkernels.core.containers import keep_containers
from qkernels.core.convert import convert
from qkernels.core.graph import arguments
from qkernels.core.layers import PREPARED
from qkernels.core.phases import observe, settle
from qkernels.core.prepare import prepared_layers, quantizers
from qkernels.core.qspec import QSpec
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe
from qkernels.errors import InvalidArgument, InvalidState


class Attached:
    """Quantizers at `sites` of `model`, in place. Trained ones follow the user's training steps; others watch.

    Args:
        model: a float model; it stays the object that it is.
        sites: what to round, by the path of the module.
        trained: whether the grids are trained, by the rules of their recipes.
        example: arguments of the model, a tensor, tuple or dict; None if they come later.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], trained: bool = True, example: Any = None):
        self.model, self.sites, self.trained = model, dict(sites), trained
        self.example: tuple[tuple, dict] | None = None if example is None else arguments(example)
        self.originals: Originals | None = attach(model, sites, trained)
        if not trained:
            observe(model)

    def __iter__(self) -> Iterator[tuple[str, str, Quantizer]]:
        """(path of the module, "weight", "output" or "input0", ..., Quantizer)."""
        return attached(self.model)

    @torch.no_grad()
    def track(self, args: tuple, kwargs: dict) -> None:
        """Remembers the arguments and runs the model: the Quantizers see a first batch, which is no training step."""
        before = [(q, q.training, q.delay) for q in quantizers(self.model)]
        for quantizer, _, _ in before:
            quantizer.train()
        try:
            self.model(*args, **kwargs)
        finally:
            for quantizer, training, delay in before:
                quantizer.training, quantizer.delay = training, delay
        self.example = args, kwargs

    def learn(self, optimizer: Optimizer, **options: Any) -> None:
        """What the rules learn joins the optimizer."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in known for p in self.model.parameters()):
            raise InvalidArgument("learn: the optimizer has no Parameter of the model; make it from this model's")
        new = [p for q in quantizers(self.model) for p in q.parameters() if id(p) not in known]
        if new:
            optimizer.add_param_group({"params": new, **options})

    def settle(self) -> None:
        """Chooses the grids that are not chosen yet: for all that was watched, and for the weights of now."""
        if not self.trained:
            settle(self.model)
        for layer in prepared_layers(self.model):
            if not layer.quantizers[WEIGHT].has_grid():
                layer.observe_weight()
        for quantizer in quantizers(self.model):
            if not quantizer.has_grid() and quantizer.observer.has_data():
                quantizer.choose()  # training ended before rounding began

    @torch.no_grad()
    def limit_weights(self, *_: Any) -> None:
        """Keeps rounded weights in [-1, 1], as sign networks want it after each step."""
        for path, site in self.sites.items():
            if site.weight is not None:
                self.model.get_submodule(path).weight.clamp_(-1.0, 1.0)

    def restore(self) -> None:
        """Takes everything off; Parameters and running statistics stay."""
        if self.originals is not None:
            self.originals.restore()
        self.originals = None


class Holder:
    """What has `attached`: the way from there to integers."""

    attached: Attached

    @property
    def bound_model(self) -> nn.Module:
        """The model, the object that it always was."""
        return self.attached.model

    def prepared(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The network as `qkernels.prepare` gives it, for `exact`, `verify` and `compare`."""
        attached = self.attached
        if attached.originals is None:
            raise InvalidState("convert: the quantizers were taken off (export_model, unwrap_model); convert first")
        if not args and not kwargs:
            if attached.example is None:
                raise InvalidState("convert: no input of the model is known; give one, convert(x)")
            args, kwargs = attached.example
        if attached.trained:
            attached.settle()
        return as_prepared(attached.model, args, kwargs)

    def convert(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The int8 network; arguments of the model are needed where none have been seen."""
        return keep_containers(convert(self.prepared(*args, **kwargs)), self.attached.model)


def recipe_of(model: nn.Module, sites: Mapping[str, Site]) -> Recipe:
    """Sites as a Recipe for `prepare`, which places activation grids by itself and leaves every bias alone."""
    weighted = [path for path, module in model.named_modules() if type(module) in PREPARED]
    pairs = {path: _pair(sites[path]) for path in weighted if path in sites and sites[path].weight is not None}
    activations = [activation for activation, _ in pairs.values() if activation is not None]
    activation = activations[0] if activations else TensorRecipe(QSpec.activation(), "moving_average")
    weight = next((weight for _, weight in pairs.values()), TensorRecipe(QSpec.weight()))
    overrides = []
    for path in weighted:
        own = pairs.get(path)
        if own is None:
            overrides.append(Override(Match("name", path), skip=True))
        elif (own[0] or activation, own[1]) != (activation, weight):
            overrides.append(Override(Match("name", path), *own))
    return Recipe(activation, weight, overrides=tuple(overrides))


def _pair(site: Site) -> tuple[TensorRecipe | None, TensorRecipe]:
    return next(iter([*site.inputs.values(), *filter(None, [site.output])]), None), site.weight
