"""`Attached`: a living model with Quantizers at its modules, from the first batch to the integer network."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from qkernels.core.attach import PARAMETERS, WEIGHT, Originals, Site, as_prepared, attach, attached
from qkernels.core.containers import keep_containers
from qkernels.core.convert import convert
from qkernels.core.fusion import norms_behind
from qkernels.core.graph import Untraceable, arguments
from qkernels.core.grids import Grid
from qkernels.core.layers import PREPARED, Prepared
from qkernels.core.phases import evaluating
from qkernels.core.qspec import QSpec
from qkernels.core.quantizer import Quantizer, State
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
        self.handles: list[RemovableHandle] = []  # of what is done after steps
        for path, key, quantizer in self if not trained else ():
            quantizer.observer.reset()
            quantizer.state = State.OFF if self._layer(path, key) else State.OBSERVE

    def __iter__(self) -> Iterator[tuple[str, str, Quantizer]]:
        """(path of the module, "weight", "output" or "input0", ..., Quantizer) of these sites."""
        return attached(self.model, self.sites)

    def _layer(self, path: str, key: str) -> Prepared | None:
        """The layer whose weight it is, where that is one that computes with it."""
        module = self.model.get_submodule(path)
        return module if key == WEIGHT and isinstance(module, Prepared) else None

    @torch.no_grad()
    def track(self, args: tuple, kwargs: dict) -> None:
        """Remembers the arguments and runs the model: the Quantizers see a first batch, which is no training step."""
        before = [(q, q.training, q.delay) for _, _, q in self]
        for quantizer, _, _ in before:
            quantizer.train()
        try:
            self.model(*args, **kwargs)
        finally:
            for quantizer, training, delay in before:
                quantizer.training, quantizer.delay = training, delay
        self.example = args, kwargs

    def learn(self, optimizers: Sequence[Optimizer], owner: Callable[[str], str] = str) -> None:
        """What the rules learn joins the group of the Parameters beside it, and from now on steps of the first count.

        Args:
            owner: the path of the module whose Parameters are meant, by the path of the site. Where an optimizer has
                none of them it is the first group of all.
        """
        check_trains(optimizers, self.model)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        known = {p: group for group in reversed(groups) for p in group["params"]}
        for path, _, quantizer in self:
            beside = self.model.get_submodule(owner(path)).parameters(recurse=False)
            group = next((known[p] for p in beside if p in known), groups[0])
            new = [p for p in quantizer.parameters() if p not in known]
            group["params"] += new  # a group of its own would be unknown to schedulers that are there already
            known |= dict.fromkeys(new, group)
        if all(quantizer.counts for _, _, quantizer in self):
            for _, _, quantizer in self:
                quantizer.counts = False
            self.after_step(optimizers[0], self._shorten_delays)

    def after_step(self, optimizer: Optimizer, task: Callable[[], None]) -> None:
        """Does `task` after each step, until the Quantizers are taken off."""
        self.handles.append(optimizer.register_step_post_hook(lambda *_: task()))

    def _shorten_delays(self) -> None:
        for _, _, quantizer in self:
            quantizer.delay = max(quantizer.delay - 1, 0)

    @torch.no_grad()
    def settle(self) -> None:
        """Chooses the grids that are not chosen yet: for all that was watched, and for the weights of now.

        What saw nothing has none, unless nothing saw anything.
        """
        seen = any(quantizer.observer.has_data() or quantizer.has_grid() for _, _, quantizer in self)
        for path, key, quantizer in self:
            if quantizer.state is State.FROZEN or (self.trained and quantizer.has_grid()):
                continue
            if layer := self._layer(path, key):
                layer.observe_weight()
            if not self.trained:
                if quantizer.observer.has_data() or not seen:
                    quantizer.choose()
                quantizer.state = State.FAKE_QUANT
            elif quantizer.observer.has_data():
                quantizer.choose()  # training ended before rounding began

    @torch.no_grad()
    def limit_parameters(self) -> None:
        """Keeps rounded Parameters in [-1, 1], as sign networks want it after each step."""
        for path, key, _ in self:
            if key in PARAMETERS:
                self.model.get_submodule(path)._parameters[key].clamp_(-1.0, 1.0)

    def restore(self) -> None:
        """Takes everything off; Parameters and running statistics stay."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.originals is not None:
            self.originals.restore()
        self.originals = None


def norms_to_fold(model: nn.Module, example: Any) -> dict[str, str]:
    """The path of the batch normalization behind a convolution, by its path; none, and a warning, without a graph."""
    try:
        with evaluating(model):
            return norms_behind(model, example)
    except Untraceable as error:
        warnings.warn(f"no batch norm is folded, as the model has no graph: {error}", stacklevel=4)
        return {}


def check_trains(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Refuses optimizers of another model."""
    known = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if known.isdisjoint(model.parameters()):
        raise InvalidArgument("the optimizer has no Parameter of the model; make it from this model's")


class Holder:
    """What has `attached`: the way from there to integers."""

    _attached: Attached

    @property
    def attached(self) -> Attached:
        """The Quantizers, while they are on."""
        if self._attached.originals is None:
            raise InvalidState(
                f"{type(self).__name__}: the quantizers were taken off (export_model, unwrap_model); convert, train "
                "and export before that, or make a new one"
            )
        return self._attached

    @attached.setter
    def attached(self, made: Attached) -> None:
        self._attached = made

    @property
    def bound_model(self) -> nn.Module:
        """The model, the object that it always was."""
        return self._attached.model

    def prepared(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The network as `qkernels.prepare` gives it, for `exact`, `verify` and `compare`."""
        attached = self.attached
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


def freeze(quantizer: Quantizer, grid: Grid) -> None:
    """Gives `quantizer` the grid to keep, as if it had seen its ends."""
    if len(grid.scale) == quantizer.scale.numel() == 1:  # one row alone reads like a whole tensor
        grid = replace(grid, per_channel=quantizer.spec.per_channel)
    quantizer.set_qparams(grid.qparams(quantizer.is_weight, quantizer.spec))
    for seen, end in zip((quantizer.observer.low, quantizer.observer.high), grid.ends(), strict=True):
        seen.copy_(torch.tensor(end, dtype=torch.float32, device="cpu"))
    quantizer.state = State.FROZEN


def recipe_of(model: nn.Module, sites: Mapping[str, Site]) -> Recipe:
    """Sites as a Recipe for `prepare`, which places activation grids by itself and leaves every bias alone."""
    own = {model.get_submodule(path): site for path, site in sites.items() if site.weight is not None}
    weighted = {path: own.get(module) for path, module in model.named_modules() if type(module) in PREPARED}
    pairs = {path: _pair(site) for path, site in weighted.items() if site is not None}
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
