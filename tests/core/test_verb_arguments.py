"""What the verbs refuse: each error is typed, names its own verb and the argument, and says what was expected."""

import json
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.expect import expect_runs
from qkernels.core.files import write_atomically
from qkernels.core.recipe import RECIPES, Match, Override, Recipe, make_recipe
from qkernels.errors import CalibrationError, InvalidArgument, InvalidState, InvalidType

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(), "head": nn.Conv2d(4, 2, 1)}
    return nn.Sequential(OrderedDict(layers)).eval()


@pytest.fixture(scope="module")
def float_model():
    return network()


@pytest.fixture(scope="module")
def prepared(float_model):
    return qkernels.calibrate(qkernels.prepare(float_model, X), [X])


@pytest.fixture(scope="module")
def converted(prepared):
    return qkernels.convert(prepared)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "model.qk", nn.Linear])
@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("prepare", lambda m: qkernels.prepare(m, X)),
        ("prepare_qat", lambda m: qkernels.prepare_qat(m, X)),
        ("calibrate", lambda m: qkernels.calibrate(m, [X])),
        ("calibrating", lambda m: qkernels.calibrating(m).__enter__()),
        ("convert", qkernels.convert),
        ("verify", lambda m: qkernels.verify(m, m, [X])),
        ("reestimate_bn", lambda m: qkernels.reestimate_bn(m, [X])),
        ("non_finite_counts", qkernels.non_finite_counts),
        ("phase", lambda m: qkernels.phase(m, qkernels.freeze).__enter__()),
        ("freeze", qkernels.freeze),
        ("disable_fake_quant", qkernels.disable_fake_quant),
    ],
)
def test_what_is_no_module_is_refused_by_the_verb(verb, call, value):
    got = {None: "NoneType", "model.qk": "str", nn.Linear: "the class Linear"}[value]
    with pytest.raises(InvalidType, match=rf"^{verb}: model must be a torch.nn.Module, got {got}$"):
        call(value)


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("calibrate", lambda m: qkernels.calibrate(m, [X])),
        ("calibrating", lambda m: qkernels.calibrating(m).__enter__()),
        ("convert", qkernels.convert),
        ("verify", lambda m: qkernels.verify(m, m, [X])),
        ("non_finite_counts", qkernels.non_finite_counts),
    ],
)
def test_float_and_converted_models_are_refused_where_a_prepared_one_is_expected(verb, call, float_model, converted):
    with pytest.raises(InvalidArgument, match=rf"^{verb}: the model must come from `prepare`, got a Sequential$"):
        call(float_model)
    with pytest.raises(InvalidArgument, match=rf"^{verb}: .*got one that is converted already$"):
        call(converted)


def test_a_module_around_a_prepared_model_converts_and_is_not_calibrated_itself(prepared):
    around = nn.Sequential(prepared, nn.Softmax(1))
    assert qkernels.verify(around, qkernels.convert(around), [X]).total_mismatches == 0
    with pytest.raises(InvalidArgument, match=r"^calibrate: .* got a Sequential around such a model$"):
        qkernels.calibrate(around, [X])


def test_a_model_that_was_not_calibrated_is_refused_by_the_verb(float_model, converted):
    fresh = qkernels.prepare(float_model, X)
    for verb, call in (
        ("convert", lambda: qkernels.convert(fresh)),
        ("verify", lambda: qkernels.verify(fresh, converted, [X])),
    ):
        with pytest.raises(InvalidState, match=rf"^{verb}: 4 of 4 Quantizers have no grid"):
            call()


def test_verify_takes_a_converted_model(prepared):
    with pytest.raises(InvalidType, match=r"^verify: converted must be a torch.nn.Module, got str$"):
        qkernels.verify(prepared, "model.qk", [X])
    with pytest.raises(
        InvalidArgument, match=r"^verify: converted must come from `convert` or `load`, got a model that"
    ):
        qkernels.verify(prepared, prepared, [X])


def test_compare_takes_a_float_and_a_converted_model(float_model, prepared, converted):
    with pytest.raises(InvalidType, match=r"^compare: float_model must be a torch.nn.Module, got str$"):
        qkernels.compare("a", converted, [X])
    with pytest.raises(InvalidType, match=r"^compare: converted must be a torch.nn.Module, got str$"):
        qkernels.compare(float_model, "a", [X])
    with pytest.raises(InvalidArgument, match=r"^compare: converted must come from `convert` or `load`"):
        qkernels.compare(float_model, prepared, [X])


# ---- batches ---------------------------------------------------------------------------------------------------------

TAKE_BATCHES = [
    ("calibrate", lambda p, c, batches: qkernels.calibrate(qkernels.prepare(network(), X), batches)),
    ("verify", lambda p, c, batches: qkernels.verify(p, c, batches)),
    ("compare", lambda p, c, batches: qkernels.compare(network(), c, batches)),
    ("reestimate_bn", lambda p, c, batches: qkernels.reestimate_bn(qkernels.prepare_qat(network(), X), batches)),
]


@pytest.mark.parametrize(("verb", "call"), TAKE_BATCHES)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (X, "batches must be an iterable of batches, got one tensor; write [x]"),
        ({"input": X}, "batches must be an iterable of batches, got one dict; write [batch]"),
        (None, "batches must be an iterable of inputs, got None"),
        ([1, 2], "a batch must be a tensor, a tuple or list of arguments or a dict of keyword arguments, got 1"),
        ([np.zeros((4, 3, 8, 8))], "or a dict of keyword arguments, got ndarray"),
        ([("x",)], "or a dict of keyword arguments, got tuple without a tensor"),
        (["x"], "or a dict of keyword arguments, got str"),
        ([None], "or a dict of keyword arguments, got None"),
    ],
)
def test_batches_that_are_none_are_refused_by_the_verb(verb, call, batches, message, prepared, converted):
    with pytest.raises(InvalidType, match=rf"^{verb}: .*{re.escape(message)}$"):
        call(prepared, converted, batches)


def test_batches_of_one_image_have_a_batch_dimension(float_model):
    """A tensor would go by its rows: images without a batch dimension, which the float layers take."""
    fresh = qkernels.prepare(float_model, X)
    with pytest.raises(InvalidType):
        qkernels.calibrate(fresh, X)
    assert qkernels.calibrate(fresh, X.split(1)) is fresh


def test_a_forward_of_ones_own_takes_any_batch(float_model):
    fresh = qkernels.prepare(float_model, X)
    qkernels.calibrate(fresh, [0, 1], forward=lambda model, index: model(X[index : index + 1]))
    qkernels.convert(fresh)


def test_no_batches_are_an_error(float_model):
    with pytest.raises(CalibrationError, match="saw no data"):
        qkernels.calibrate(qkernels.prepare(float_model, X), [])


# ---- prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [qkernels.prepare, qkernels.prepare_qat])
@pytest.mark.parametrize(
    ("example", "message"),
    [
        (X[:, :2], "RuntimeError: Given groups=1, weight of size"),
        (X.double(), "RuntimeError: Input type"),
    ],
)
def test_an_example_that_does_not_fit_is_named_in_one_line(verb, example, message, float_model):
    with pytest.raises(InvalidArgument) as caught:
        verb(float_model, example)
    text = str(caught.value)
    assert text.startswith(f"{verb.__name__}: the model does not run on example_inputs: {message}")
    assert "\n" not in text
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "While executing" not in str(caught.value.__cause__)


def test_an_example_that_does_not_fit_a_model_without_a_graph_is_named_too():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if bool(x.sum() > 0) else x

    with pytest.raises(
        InvalidArgument, match=r"^prepare: the model does not run on example_inputs: RuntimeError: mat1"
    ):
        qkernels.prepare(Flow().eval(), torch.ones(2, 3))


def test_another_verb_can_say_the_same(float_model):
    with pytest.raises(
        InvalidArgument, match=r"^compile: the model does not run on example_inputs: RuntimeError: Given"
    ):
        expect_runs("compile", float_model, (X[:, :2],), {})


@pytest.mark.parametrize("verb", [qkernels.prepare, qkernels.prepare_qat])
@pytest.mark.parametrize(("example", "got"), [(X.numpy(), "ndarray"), (None, "None"), ("x", "str")])
def test_an_example_without_tensors_is_refused(verb, example, got, float_model):
    with pytest.raises(InvalidType, match=rf"^{verb.__name__}: example_inputs must be a tensor, .*, got {got}$"):
        verb(float_model, example)


def test_unknown_options_are_refused_by_the_verb(float_model):
    with pytest.raises(InvalidArgument, match=r"^prepare: unknown option 'observr'; did you mean 'observer'"):
        qkernels.prepare(float_model, X, observr="minmax")
    with pytest.raises(InvalidArgument, match=r"^prepare: unknown option 'start_step'"):
        qkernels.prepare(float_model, X, start_step=3)
    with pytest.raises(InvalidArgument, match=r"^prepare_qat: unknown option 'start_stp'; did you mean 'start_step'"):
        qkernels.prepare_qat(float_model, X, start_stp=3)


@pytest.mark.parametrize("verb", [qkernels.prepare, qkernels.prepare_qat])
@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("head.weight", "'head.weight' is a parameter of 'head': write 'head'"),
        ("head.bias", "'head.bias' is a parameter of 'head': write 'head'"),
        ("norm.weight", "'norm.weight' is a parameter of 'norm': write 'norm'"),
        (re.compile(r".*\.weight"), "'a.weight' is a parameter of 'a': write 'a'"),
        ("input", "'input' is an input: name those that read it"),
        (re.compile("inp.*"), "'input' is an input: name those that read it"),
    ],
)
def test_a_skipped_name_of_no_operation_is_refused(verb, skip, message, float_model):
    with pytest.raises(
        InvalidArgument, match=re.escape(f"{verb.__name__}: skip names modules and operations; {message}")
    ):
        verb(float_model, X, skip=[skip])


def test_what_names_an_operation_too_is_taken(float_model):
    rows = qkernels.prepare(float_model, X, skip=[re.compile("head.*"), "relu"]).report
    assert {row.name for row in rows.stayed_float} == {"relu", "head"}


def test_a_parameter_of_a_part_is_named_by_its_path():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x) if bool(x.sum() > -1e9) else x

    with pytest.raises(InvalidArgument, match=r"'body\.a\.weight' is a parameter of 'body\.a': write 'body\.a'"):
        qkernels.prepare(Flow().eval(), X, skip=["body.a.weight"])
    with pytest.raises(InvalidArgument, match=r"'body\.input' is an input"):
        qkernels.prepare(Flow().eval(), X, skip=["body.input"])


def with_rules(*rules):
    return Recipe(RECIPES["int8"].activation, RECIPES["int8"].weight, rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Override(Match.of("head.weight"), weight=make_recipe(bits=4).weight), "an Override names .* write 'head'"),
        (Override(Match.of("input"), weight=make_recipe(bits=4).weight), "'input' is an input.*activation="),
        (Override(Match.of("relu"), weight=make_recipe(bits=4).weight), "must name a layer that has one.*'relu'"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(rule, message, float_model):
    with pytest.raises(InvalidArgument, match=message):
        qkernels.prepare(float_model, X, recipe=with_rules(rule))


def test_overrides_of_inputs_and_layers_are_taken(float_model):
    four = make_recipe(bits=4)
    rules = Override(Match.of("input"), activation=four.activation), Override(Match.of("head"), weight=four.weight)
    fresh = qkernels.prepare(float_model, X, recipe=with_rules(*rules))
    specs = {m.source: m.spec for m in fresh.modules() if isinstance(m, qkernels.core.quantizer.Quantizer)}
    assert (specs["input"], specs["head.weight"]) == (four.activation.spec, four.weight.spec)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [5, None])
def test_skip_that_is_no_list_is_refused(skip):
    with pytest.raises(InvalidType, match=rf"^skip must be a path, .*or a list of them, got {skip}$"):
        make_recipe(skip=skip)


def without(key):
    config = json.loads(RECIPES["int8"].to_json())
    del config[key]
    return json.dumps(config)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, InvalidType, "text must be a string, got NoneType"),
        ("{", InvalidArgument, "text must be JSON: Expecting property name"),
        ("[]", InvalidArgument, "text must be a JSON object, got a list"),
        (without("weight"), InvalidArgument, r"malformed recipe \(KeyError\('weight'\)\)"),
        ('{"format": 1, "activation": 3}', InvalidArgument, "malformed recipe"),
    ],
)
def test_json_of_no_recipe_is_refused(text, error, message):
    with pytest.raises(error, match=rf"^Recipe\.from_json: {message}"):
        Recipe.from_json(text)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "error"), [("none/x.qk", FileNotFoundError), (".", IsADirectoryError)])
def test_a_file_that_cannot_be_written_is_named(name, error, converted, tmp_path):
    path = tmp_path / "folder" / name
    path.parent.parent.mkdir(exist_ok=True)
    (tmp_path / "folder").mkdir(exist_ok=True)
    with pytest.raises(error) as caught:
        qkernels.save(converted, path)
    assert caught.value.filename == str(path)
    assert ".tmp" not in str(caught.value)
    assert list(tmp_path.rglob("*.tmp")) == []
    with pytest.raises(error):
        write_atomically(path, b"")


def test_a_model_without_an_integer_layer_is_not_compared_or_compiled():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x) if float(x.sum()) > 0 else x

    model, x = Branching().eval(), torch.ones(2, 4)
    prepared = qkernels.prepare(model, (x,))
    with qkernels.calibrating(prepared):
        prepared(x)
    converted = qkernels.convert(prepared)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    for verb, call in (
        ("compare", lambda: qkernels.compare(model, converted, [x])),
        ("compile", lambda: qkernels.compile(converted, (x,))),
    ):
        with pytest.raises(InvalidArgument, match=f"{verb}: Branching has no integer layer"):
            call()
