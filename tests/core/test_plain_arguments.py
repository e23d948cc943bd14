"""Values that grids and recipes are made of: each wrong one is refused by a typed error that names it."""

import re

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.recipe import Match, Override, Recipe, TensorRecipe, make_recipe
from qkernels.errors import InvalidArgument, InvalidType
from qkernels.report import Comparison, LayerComparison

ONE, ZERO = torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
ACTIVATION, WEIGHT = make_recipe().activation, make_recipe().weight

WRONG = [
    (lambda: QParams.per_tensor(0.1, 3.9), InvalidType, "QParams.per_tensor: zero_point must be an integer, got 3.9"),
    (lambda: QParams.per_tensor("a", 3), InvalidType, "QParams.per_tensor: scale must be a number, got 'a'"),
    (lambda: QParams(ONE, torch.tensor([3.7])), InvalidArgument, "QParams: zero_point must be integers, got [3.7"),
    (lambda: QParams(ONE, torch.tensor([2**32])), InvalidArgument, "QParams: zero_point must be integers, got [4294"),
    (
        lambda: QParams(0.1, 0),
        InvalidType,
        "QParams: scale must be a tensor (QParams.per_tensor takes numbers), got fl",
    ),
    (lambda: QParams(ONE, ZERO, axis="a"), InvalidType, "QParams: axis must be an integer, got 'a'"),
    (lambda: QParams(ONE[:0], ZERO[:0], axis=0), InvalidArgument, "one at least (and 1 if axis is None), got 0 and 0"),
    (lambda: QParams(ONE, ZERO).quantize(None), InvalidType, "QParams.quantize: x must be a tensor, got NoneType"),
    (lambda: QParams(ONE, ZERO).dequantize(3), InvalidType, "QParams.dequantize: q must be a tensor, got int"),
    (lambda: QParams.from_config({}), InvalidType, "QParams.from_config: config must be what to_config gives (KeyErr"),
    (lambda: QSpec(qmin=0.5), InvalidType, "QSpec: qmin must be an integer, got 0.5"),
    (lambda: QSpec(qmin=None), InvalidType, "QSpec: qmin must be an integer, got None"),
    (lambda: QSpec(qmax=True), InvalidType, "QSpec: qmax must be an integer, got True"),
    (lambda: QSpec(per_channel=True, axis="a"), InvalidType, "QSpec: axis must be an integer, got 'a'"),
    (lambda: QSpec(symmetric="no"), InvalidType, "QSpec: symmetric must be True or False, got 'no'"),
    (lambda: QSpec(min_scale=None), InvalidArgument, "QSpec: min_scale must be in [2**-50, 2**50], got None"),
    (lambda: QSpec(block=3), InvalidType, "QSpec: block must be None or a tuple of sizes, got 3"),
    (lambda: QSpec(block=(1, "a")), InvalidType, "QSpec: a size in block must be an integer, got 'a'"),
    (lambda: QSpec.activation("8"), InvalidArgument, "QSpec: bits must be an integer from 2 to 21, got '8'"),
    (lambda: QSpec.even("a"), InvalidArgument, "QSpec: bits must be an integer from 2 to 21, got 'a'"),
    (lambda: QSpec.even(0), InvalidArgument, "QSpec: bits must be an integer from 2 to 21, got 0"),
    (lambda: QSpec.even(0, signed=False), InvalidArgument, "QSpec: bits must be an integer from 1 to 21, got 0"),
    (lambda: QSpec.from_config({}), InvalidType, "QSpec.from_config: config must be what to_config gives (KeyError('d"),
    (lambda: QSpec.from_config(None), InvalidType, "QSpec.from_config: config must be what to_config gives (TypeErr"),
    (lambda: TensorRecipe(None), InvalidType, "TensorRecipe: spec must be of type QSpec, got None"),
    (lambda: TensorRecipe(QSpec(), options=3), InvalidType, "TensorRecipe: options must be a mapping of names to val"),
    (lambda: TensorRecipe(QSpec(), dynamic="no"), InvalidType, "TensorRecipe: dynamic must be True or False, got 'no'"),
    (lambda: Override(None), InvalidType, "Override: match must be of type Match, got None"),
    (lambda: Override(Match.of("a"), "b"), InvalidType, "Override: activation must be of type TensorRecipe or None"),
    (lambda: Override(Match.of("a"), skip="no"), InvalidType, "Override: skip must be True or False, got 'no'"),
    (lambda: Match("name", 3), InvalidType, "Match: pattern must be of type str, got 3"),
    (lambda: Match("regex", "("), InvalidArgument, "Match: pattern must be a regex, got '(' (missing )"),
    (lambda: Recipe(None, None), InvalidType, "Recipe: activation must be of type TensorRecipe, got None"),
    (lambda: Recipe(ACTIVATION, "b"), InvalidType, "Recipe: weight must be of type TensorRecipe, got 'b'"),
    (lambda: Recipe(ACTIVATION, WEIGHT, 3), InvalidType, "Recipe: overrides must be of type Iterable, got 3"),
    (lambda: Recipe(ACTIVATION, WEIGHT, ["a"]), InvalidType, "Recipe: each of overrides must be of type Override, got"),
    (lambda: make_recipe(symmetric_activations="no"), InvalidType, "symmetric_activations must be True or False, got"),
    (lambda: make_recipe(observer_options=3), InvalidType, "observer_options must be a mapping of names to values, g"),
    (lambda: make_recipe(rule=["lsq"]), InvalidArgument, "unknown rule ['lsq']; there are ["),
    (lambda: make_recipe(observer=["mse"]), InvalidArgument, "unknown observer ['mse']; there are ["),
    (lambda: make_recipe(weight_granularity=[]), InvalidArgument, "weight_granularity must be one of ["),
    (lambda: make_recipe(bits="8"), InvalidArgument, "QSpec: bits must be an integer from 2 to 21, got '8'"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_a_wrong_value_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_integers_of_other_libraries_are_integers():
    numpy = pytest.importorskip("numpy")
    spec = QSpec(qmin=numpy.int64(3), qmax=torch.tensor(7), per_channel=True, axis=numpy.int32(0))
    assert QSpec.from_config(spec.to_config()) == QSpec(qmin=3, qmax=7, per_channel=True)
    grid = QParams(ONE, torch.tensor([3.0]))
    assert grid == QParams.per_tensor(0.1, numpy.int64(3))
    assert grid.zero_point.dtype == torch.int32


def test_one_bit_without_a_sign_is_a_grid():
    spec = QSpec.even(1, signed=False)
    assert (spec.qmin, spec.qmax) == (0, 1)


@pytest.mark.parametrize("verb", [qkernels.calibrate, qkernels.reestimate_bn])
def test_a_forward_that_cannot_be_called_is_refused(verb):
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    prepared = qkernels.prepare(model.eval(), x) if verb is qkernels.calibrate else qkernels.prepare_qat(model, x)
    with pytest.raises(InvalidType, match=rf"^{verb.__name__}: forward must be a function of .*, got 3$"):
        verb(prepared, [x], forward=3)


def test_estimating_from_no_batches_names_the_verb():
    prepared = qkernels.prepare_qat(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3))
    with pytest.raises(InvalidArgument, match=r"^reestimate_bn: .* no batches$"):
        qkernels.reestimate_bn(prepared, [])


@pytest.mark.parametrize(("count", "error"), [("a", InvalidType), (1.5, InvalidType), (-1, InvalidArgument)])
def test_the_worst_are_counted(count, error):
    comparison = Comparison((LayerComparison("a", "linear", 3.0), LayerComparison("b", "linear", 2.0)), 1.0, 1.0, 1)
    assert [layer.name for layer in comparison.worst(1)] == ["b"]
    with pytest.raises(error, match=r"^worst: count must be (an integer|at least 0), got"):
        comparison.worst(count)
