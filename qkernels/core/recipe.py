"""`Recipe`: what to quantize and how, as a value. Every front end parses into one; `prepare` carries it out."""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

from qkernels.core.corrections import Correction, correction_from_config, correction_to_config
from qkernels.core.corrections import corrections as correction_values
from qkernels.core.observers import OBSERVERS, make_observer
from qkernels.core.qspec import QSpec
from qkernels.core.rules import RULES, make_rule
from qkernels.errors import InvalidArgument, InvalidType, boolean

FORMAT = 1
Options = tuple[tuple[str, Any], ...]


def _expect(what: str, value: Any, cls: type, optional: bool = False) -> None:
    if not isinstance(value, cls) and not (optional and value is None):
        raise InvalidType(f"{what} must be of type {cls.__name__}{' or None' if optional else ''}, got {value!r}")


def _expect_known(what: str, name: Any, known: Iterable[str]) -> None:
    if not isinstance(name, str) or name not in known:
        raise InvalidArgument(f"unknown {what} {name!r}; there are {sorted(known)}")


def _options(what: str, options: Any) -> Options:
    """Of a mapping, or of pairs, in the order of their names."""
    try:
        return tuple(sorted(dict(options).items()))
    except (TypeError, ValueError):
        raise InvalidType(f"{what} must be a mapping of names to values, got {options!r}") from None


@dataclass(frozen=True)
class TensorRecipe:
    """How one kind of tensor gets its grid: the kind of grid, the observer by name, and the observer's options.

    `rule` and `rule_options` say how the grid behaves in training (`prepare_qat`); calibration does without.
    `non_finite` says what the observer does with NaN and infinities: "error", or "ignore" to leave them out and count
    them (`qkernels.non_finite_counts`).
    `dynamic` (of activations): no observer chooses the grid; linear layers put each row of their input onto the grid of
    its own extremes when it arrives, take and return float tensors, and need no calibration. All else stays float.
    """

    spec: QSpec
    observer: str = "minmax"
    options: Options = ()
    rule: str = "ste"
    rule_options: Options = ()
    non_finite: str = "error"
    dynamic: bool = False

    def __post_init__(self):
        _expect("TensorRecipe: spec", self.spec, QSpec)
        boolean("TensorRecipe: dynamic", self.dynamic)
        object.__setattr__(self, "options", _options("TensorRecipe: options", self.options))
        object.__setattr__(self, "rule_options", _options("TensorRecipe: rule_options", self.rule_options))
        _expect_known("rule", self.rule, RULES)
        try:
            make_rule(self.rule, self.spec, 1, **dict(self.rule_options))
        except TypeError as error:
            raise InvalidArgument(f"rule {self.rule!r}: {error}") from error
        if self.non_finite not in ("error", "ignore") or (self.non_finite == "ignore" and self.spec.per_channel):
            raise InvalidArgument(
                f'non_finite must be "error", or "ignore" on a grid for the whole tensor, got {self.non_finite!r}'
            )
        _expect_known("observer", self.observer, OBSERVERS)
        try:
            make_observer(self.observer, self.spec, 1, **dict(self.options))
        except TypeError as error:
            raise InvalidArgument(f"observer {self.observer!r}: {error}") from error

    def to_config(self) -> dict:
        config = {"spec": self.spec.to_config(), "observer": self.observer, "options": dict(self.options)}
        return config | {
            "rule": self.rule,
            "rule_options": dict(self.rule_options),
            "non_finite": self.non_finite,
            "dynamic": self.dynamic,
        }

    @classmethod
    def from_config(cls, config: dict) -> "TensorRecipe":
        spec, options = QSpec.from_config(config["spec"]), tuple(config["options"].items())
        rule_options = tuple(config.get("rule_options", {}).items())
        non_finite = config.get("non_finite", "error")
        rule, dynamic = config.get("rule", "ste"), config.get("dynamic", False)
        return cls(spec, config["observer"], options, rule, rule_options, non_finite, dynamic)


_INLINE_FLAGS = {re.ASCII: "a", re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s", re.VERBOSE: "x"}


@dataclass(frozen=True)
class Match:
    """Which modules or calls a rule is for.

    `by` is "name" (the path or a parent's), "regex" (of the whole path) or "type": a class of modules, or what a graph
    calls, a function ("torch.add", "operator.add", see `function_name`) or a method of tensors ("add").
    """

    by: str
    pattern: str

    def __post_init__(self):
        if self.by not in ("name", "type", "regex"):
            raise InvalidArgument(f"Match: by must be name, type or regex, got {self.by!r}")
        _expect("Match: pattern", self.pattern, str)
        if self.by == "regex":
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise InvalidArgument(f"Match: pattern must be a regex, got {self.pattern!r} ({error})") from error

    @classmethod
    def of(cls, what: "str | type | Callable | re.Pattern | Match") -> "Match":
        if isinstance(what, Match):
            return what
        if isinstance(what, str):
            return cls("name", what)
        if isinstance(what, re.Pattern):
            flags = "".join(letter for flag, letter in _INLINE_FLAGS.items() if what.flags & flag)
            return cls("regex", f"(?{flags}){what.pattern}" if flags else what.pattern)
        if isinstance(what, type) and issubclass(what, nn.Module):
            return cls("type", type_name(what))
        if callable(what) and not isinstance(what, (type, nn.Module)):
            return cls("type", function_name(what))
        raise InvalidType(
            f"a module is named by its path, a Module class or a compiled regex, a call by its function, got {what!r}"
        )

    def __call__(self, path: str, types: Iterable[str]) -> bool:
        """Whether it fits something at `path` that lies in modules of `types` (its own first)."""
        if self.by == "name":
            return path == self.pattern or path.startswith(self.pattern + ".")
        if self.by == "regex":
            return re.fullmatch(self.pattern, path) is not None
        return self.pattern in types


def type_name(cls: type) -> str:
    """`Conv2d` for torch.nn classes, the full dotted name for others."""
    cls = getattr(cls, "stands_for", cls)
    return cls.__name__ if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__qualname__}"


def function_name(function: Callable) -> str:
    """`torch.add`, `torch.nn.functional.relu`, `operator.add`: `x + y` in a graph is the last, not the first."""
    own = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', function)}"
    return resolve_name(function) or own.removeprefix("_")


@dataclass(frozen=True)
class Override:
    """A rule for some modules: other tensors' recipes (None: as the rest), or `skip` to leave them float."""

    match: Match
    activation: TensorRecipe | None = None
    weight: TensorRecipe | None = None
    skip: bool = False

    def __post_init__(self):
        _expect("Override: match", self.match, Match)
        _expect("Override: activation", self.activation, TensorRecipe, optional=True)
        _expect("Override: weight", self.weight, TensorRecipe, optional=True)
        boolean("Override: skip", self.skip)

    def to_config(self) -> dict:
        return {
            "by": self.match.by,
            "pattern": self.match.pattern,
            "activation": self.activation and self.activation.to_config(),
            "weight": self.weight and self.weight.to_config(),
            "skip": self.skip,
        }

    @classmethod
    def from_config(cls, config: dict) -> "Override":
        return cls(
            Match(config["by"], config["pattern"]),
            config["activation"] and TensorRecipe.from_config(config["activation"]),
            config["weight"] and TensorRecipe.from_config(config["weight"]),
            config["skip"],
        )


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how.

    Attributes:
        activation: grids of inputs and outputs of layers.
        weight: grids of weights.
        overrides: rules for some modules and calls by path, type or regex; where several fit, the last one wins.
        corrections: what is done against rounding errors at the end of calibration, in this order.

    >>> Recipe.from_json(RECIPES["int8"].to_json()) == RECIPES["int8"]
    True
    """

    activation: TensorRecipe = field(default_factory=lambda: TensorRecipe(QSpec.activation(), "histogram"))
    weight: TensorRecipe = field(default_factory=lambda: TensorRecipe(QSpec.weight(), "minmax"))
    overrides: tuple[Override, ...] = ()
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self):
        _expect("Recipe: activation", self.activation, TensorRecipe)
        _expect("Recipe: weight", self.weight, TensorRecipe)
        _expect("Recipe: overrides", self.overrides, Iterable)
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for rule in self.overrides:
            _expect("Recipe: each of overrides", rule, Override)
        object.__setattr__(self, "corrections", correction_values(self.corrections))
        if self.activation.spec.per_channel and self.activation.spec.block is None:
            raise InvalidArgument("Recipe: activations take one grid for the whole tensor, got per_channel=True")
        if self.weight.spec.dtype not in (torch.int8, torch.int32):
            raise InvalidArgument(f"Recipe: weights must be int8, got {self.weight.spec.dtype}")
        activations = [self.activation, *(rule.activation for rule in self.overrides if rule.activation is not None)]
        if self.corrections and any(activation.dynamic for activation in activations):
            raise InvalidArgument("Recipe: corrections come from calibration, which dynamic activations do without")

    def for_module(self, path: str, types: Iterable[str] = ()) -> "Override":
        """The recipes for the module at `path`: an Override with everything filled in."""
        found = Override(Match("name", path), self.activation, self.weight)
        types = tuple(types)
        for rule in self.overrides:
            if rule.match(path, types):
                found = replace(
                    found,
                    activation=rule.activation or found.activation,
                    weight=rule.weight or found.weight,
                    skip=rule.skip,
                )
        return found

    def skipping(self, *what: "str | type | Callable | re.Pattern") -> "Recipe":
        """The same recipe that leaves the named modules and calls float."""
        return replace(self, overrides=(*self.overrides, *(Override(Match.of(w), skip=True) for w in what)))

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "activation": self.activation.to_config(),
                "weight": self.weight.to_config(),
                "overrides": [rule.to_config() for rule in self.overrides],
                "corrections": [correction_to_config(c) for c in self.corrections],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """What `to_json` wrote.

        Raises:
            InvalidArgument: it is no JSON, of another format, or not a recipe.
        """
        if not isinstance(text, (str, bytes, bytearray)):
            raise InvalidType(f"Recipe.from_json: text must be a string, got {type(text).__name__}")
        try:
            config = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"Recipe.from_json: text must be JSON: {error}") from error
        if not isinstance(config, dict):
            raise InvalidArgument(f"Recipe.from_json: text must be a JSON object, got a {type(config).__name__}")
        if config.get("format") != FORMAT:
            raise InvalidArgument(f"Recipe: format must be {FORMAT}, got {config.get('format')!r}")
        try:
            return cls(
                TensorRecipe.from_config(config["activation"]),
                TensorRecipe.from_config(config["weight"]),
                tuple(Override.from_config(rule) for rule in config["overrides"]),
                tuple(correction_from_config(c) for c in config["corrections"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidType):
                raise
            raise InvalidArgument(f"Recipe.from_json: malformed recipe ({error!r})") from error


def _low_bits(weight: int, activation: int = 8, corrections: tuple = ()) -> Recipe:
    """Few bits want grids with the least squared error: minmax spends most codes on a few large values."""
    return Recipe(
        TensorRecipe(QSpec.activation(activation), "histogram" if activation == 8 else "mse"),
        TensorRecipe(QSpec.weight(weight), "mse"),
        corrections=corrections,
    )


# wNaM: weights of N bits in int8, activations of M bits in uint8. What follows are corrections.
RECIPES: Mapping[str, Recipe] = {
    "int8": Recipe(),
    "int8-minmax": Recipe(activation=TensorRecipe(QSpec.activation(), "minmax")),
    "int8-dynamic": Recipe(activation=TensorRecipe(QSpec.activation(), "minmax", dynamic=True)),
    "int8-bias": Recipe(corrections=("bias",)),
    "int8-adaround": Recipe(corrections=("adaround", "bias")),
    "w4a8": _low_bits(4),
    "w4a8-bias": _low_bits(4, corrections=("bias",)),
    "w4a8-adaround": _low_bits(4, corrections=("adaround", "bias")),
    "w4a4": _low_bits(4, 4),
    "w3a3": _low_bits(3, 3),
    "w2a2": _low_bits(2, 2),
}
GRANULARITIES = {"per_channel": True, "per_tensor": False}


def make_recipe(
    recipe: "str | Recipe" = "int8",
    *,
    observer: str | None = None,
    observer_options: Mapping[str, Any] | None = None,
    weight_observer: str | None = None,
    weight_granularity: str | None = None,
    bits: int | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    symmetric_activations: bool | None = None,
    corrections: "str | Correction | Iterable[str | Correction] | None" = None,
    rule: str | None = None,
    weight_rule: str | None = None,
    activation_rule: str | None = None,
    non_finite: str | None = None,
    skip: Iterable["str | type | Callable | re.Pattern"] = (),
) -> Recipe:
    """A recipe from a name or a Recipe, changed by keyword options.

    Args:
        recipe: a name in `RECIPES` or a Recipe.
        observer, observer_options: how activation ranges are chosen.
        weight_observer: how weight ranges are chosen ("minmax" or "mse").
        weight_granularity: "per_channel" or "per_tensor".
        bits: of weights and activations, 2 to 8; weight_bits and activation_bits set one of them. Weights of more bits
            are only simulated, in float.
        symmetric_activations: the zero point is the middle code.
        corrections: what is done against rounding errors at the end of calibration: names ("bias", "adaround") or
            values of `qkernels.core.corrections`; () for nothing.
        rule: how grids behave in training, see `qkernels.core.rules`; weight_rule and activation_rule set one of them.
        non_finite: NaN and infinities in activations are an "error", or "ignore" leaves them out and counts them.
        skip: modules to leave float, each by path (its children included), Module class or compiled regex; and calls,
            by the function as the model calls it (`torch.add`, `operator.add` for `x + y`).
    """
    if isinstance(recipe, str):
        _expect_known("recipe", recipe, RECIPES)
        recipe = RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise InvalidType(f"recipe must be a name or a Recipe, got {type(recipe).__name__}")
    activation, weight = recipe.activation, recipe.weight
    activation_bits = activation_bits if activation_bits is not None else bits
    if activation_bits is not None or symmetric_activations is not None:
        old = activation.spec
        spec = old if activation_bits is None else QSpec.activation(activation_bits, old.dtype)
        symmetric = old.symmetric
        if symmetric_activations is not None:
            symmetric = boolean("symmetric_activations", symmetric_activations)
        activation = replace(activation, spec=replace(spec, symmetric=symmetric))
    if observer_options is not None:
        observer_options = _options("observer_options", observer_options)
    if activation.dynamic and (observer is not None or observer_options is not None or non_finite is not None):
        raise InvalidArgument(
            "a recipe that quantizes activations when they arrive has no observer to choose, and is not trained"
        )
    if observer is not None:
        activation = replace(activation, observer=observer, options=observer_options or ())
    elif observer_options is not None:
        activation = replace(activation, options=observer_options)
    weight_bits = weight_bits if weight_bits is not None else bits
    if weight_bits is not None:
        weight = replace(weight, spec=QSpec.weight(weight_bits, weight.spec.per_channel))
    if weight_granularity is not None:
        if not isinstance(weight_granularity, str) or weight_granularity not in GRANULARITIES:
            raise InvalidArgument(
                f"weight_granularity must be one of {list(GRANULARITIES)}, got {weight_granularity!r}"
            )
        weight = replace(weight, spec=replace(weight.spec, per_channel=GRANULARITIES[weight_granularity]))
    if weight_observer is not None:
        weight = replace(weight, observer=weight_observer)
    weight_rule, activation_rule = weight_rule or rule, activation_rule or rule
    if weight_rule is not None:
        weight = replace(weight, rule=weight_rule, rule_options=())
    if activation_rule is not None:
        activation = replace(activation, rule=activation_rule, rule_options=())
    if non_finite is not None:
        activation = replace(activation, non_finite=non_finite)
    if isinstance(skip, (str, type, re.Pattern)) or callable(skip):
        skip = (skip,)
    if not isinstance(skip, Iterable):
        raise InvalidType(
            f"skip must be a path, Module class, function or compiled regex, or a list of them, got {skip!r}"
        )
    corrections = recipe.corrections if corrections is None else correction_values(corrections)
    return replace(recipe, activation=activation, weight=weight, corrections=corrections).skipping(*skip)


OPTIONS = tuple(name for name in inspect.signature(make_recipe).parameters if name != "recipe")
