"""Recipes are values: equality, json, options, rules for some modules."""

import json
import operator
import re

import pytest
import torch
from torch import nn

from qkernels.core.corrections import AdaRound, BiasCorrection
from qkernels.core.qspec import QSpec
from qkernels.core.recipe import RECIPES, Match, Override, Recipe, TensorRecipe, make_recipe
from qkernels.errors import InvalidArgument, InvalidType


def test_options_change_only_what_they_name():
    base = RECIPES["int8"]
    changed = make_recipe("int8", observer="percentile", observer_options={"percentile": 99.0})
    assert changed.weight == base.weight
    assert changed.activation == TensorRecipe(QSpec.activation(), "percentile", (("percentile", 99.0),))
    assert make_recipe(weight_granularity="per_tensor").weight.spec == QSpec.weight(per_channel=False)
    four = make_recipe(bits=4)
    assert (four.activation.spec, four.weight.spec) == (QSpec.activation(4), QSpec.weight(4))
    assert make_recipe(weight_bits=4).activation == base.activation
    assert make_recipe(symmetric_activations=True).activation.spec.symmetric


def test_a_recipe_survives_json():
    recipe = make_recipe(
        bits=6,
        observer="moving_average",
        observer_options={"momentum": 0.1},
        skip=["head", nn.Linear, re.compile("a.*b")],
    )
    rule = Override(Match.of("x"), activation=TensorRecipe(QSpec.activation(4), "minmax"))
    recipe = Recipe(recipe.activation, recipe.weight, (*recipe.overrides, rule))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert hash(Recipe.from_json(recipe.to_json())) == hash(recipe)
    assert recipe != make_recipe(bits=6)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_named_recipes_survive_json(name):
    assert Recipe.from_json(RECIPES[name].to_json()) == RECIPES[name]


def test_names_say_the_bits():
    assert RECIPES["w4a8"].weight.spec == QSpec.weight(4)
    assert RECIPES["w4a8"].activation.spec == QSpec.activation(8)
    assert RECIPES["w2a2"].activation.spec == QSpec.activation(2)
    assert RECIPES["w4a8-adaround"].corrections == (AdaRound(), BiasCorrection())
    assert make_recipe("w4a8", corrections=AdaRound(steps=3)).corrections == (AdaRound(steps=3),)
    assert make_recipe("w4a8-adaround", corrections=()) == RECIPES["w4a8"]


def test_names_cover_children_and_regexes_whole_paths():
    recipe = make_recipe(skip=["layer1", nn.LayerNorm, re.compile(r".*\.conv2")])
    assert recipe.for_module("layer1").skip
    assert recipe.for_module("layer1.0.conv").skip
    assert not recipe.for_module("layer10.conv").skip
    assert recipe.for_module("layer2.conv2").skip
    assert not recipe.for_module("layer2.conv22").skip
    assert recipe.for_module("norm", ["LayerNorm"]).skip


def test_calls_are_named_by_the_function_as_the_model_calls_it():
    recipe = make_recipe(skip=[torch.add, nn.functional.relu, operator.mul])
    patterns = [rule.match.pattern for rule in recipe.overrides]
    assert patterns == ["torch.add", "torch.nn.functional.relu", "operator.mul"]
    assert make_recipe(skip=torch.add).for_module("add", ["torch.add"]).skip
    assert not recipe.for_module("add", ["operator.add"]).skip
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_last_rule_that_fits_wins():
    keep = Override(Match.of("body.last"))
    recipe = make_recipe(skip=["body"])
    recipe = Recipe(recipe.activation, recipe.weight, (*recipe.overrides, keep))
    assert recipe.for_module("body.first").skip
    assert not recipe.for_module("body.last").skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "int7"}, InvalidArgument, "int7"),
        ({"recipe": 8}, InvalidType, "int"),
        ({"observer": "best"}, InvalidArgument, "best"),
        ({"observer": "minmax", "observer_options": {"bins": 3}}, InvalidArgument, "bins"),
        ({"bits": 1}, InvalidArgument, "bits"),
        ({"weight_granularity": "row"}, InvalidArgument, "row"),
        ({"weight_observer": "histogram"}, InvalidArgument, "per tensor"),
        ({"skip": [3]}, InvalidType, "3"),
        ({"corrections": "luck"}, InvalidArgument, "luck.*adaround"),
        ({"corrections": [3]}, InvalidType, "3"),
        ({"corrections": 5}, InvalidType, "corrections: takes names or values"),
        ({"observer": "histogram", "observer_options": {"codes": 0}}, InvalidArgument, "codes must be at least 2"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make_recipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps"), ({"learning_rate": float("nan")}, "learning_rate"), ({"warm_start": 1.5}, "warm_start")],
)
def test_corrections_check_their_options(options, message):
    with pytest.raises(InvalidArgument, match=message):
        AdaRound(**options)


def test_unknown_options_of_a_saved_correction_are_refused():
    config = json.loads(RECIPES["w4a8-adaround"].to_json())
    config["corrections"][0]["luck"] = 1
    with pytest.raises(InvalidArgument, match="luck"):
        Recipe.from_json(json.dumps(config))


def test_unsigned_weights_and_per_channel_activations_are_refused():
    with pytest.raises(InvalidArgument, match="int8"):
        Recipe(weight=TensorRecipe(QSpec()))
    with pytest.raises(InvalidArgument, match="whole tensor"):
        Recipe(activation=TensorRecipe(QSpec(per_channel=True)))
    assert torch.uint8 == Recipe().activation.spec.dtype


def test_flags_of_a_regex_count():
    match = Match.of(re.compile("head.*", re.IGNORECASE))
    assert [match(path, ()) for path in ("Head", "head2", "tail")] == [True, True, False]
    assert not Match.of(re.compile("head.*"))("Head", ())
