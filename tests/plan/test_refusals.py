"""What a plan cannot do ends in a typed error or in an island: no crash, no silent wrong answer."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import converted, leaves, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import qkernels
from qkernels.errors import CheckpointError, InvalidArgument, InvalidType, Unsupported
from qkernels.plan import Plan
from qkernels.plan.compiler import record
from qkernels.plan.format import plan_bytes
from qkernels.plan.lower import lower_graph

pytestmark = pytest.mark.filterwarnings("ignore")  # islands are announced, and torch warns of what is done here


class Net(nn.Module):
    """A convolution, and `what(convolved, x)`."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 8, 3, padding=1), what

    def forward(self, x):
        return self.what(self.conv(x), x)


def model_of(what):
    example = tensors([(2, 3, 8, 8)])
    return converted(Net(what), *example), example


def plan_of(what):
    model, example = model_of(what)
    return qkernels.compile(model, tuple(example)), model, *example


@pytest.fixture(scope="module")
def simple():
    plan, _, x = plan_of(lambda y, x: y)
    return plan, x


# ---- tensors without memory


def freed(x, start):
    copy = x.clone()
    view = copy[start:]
    copy.untyped_storage().resize_(0)
    return view


WITHOUT_MEMORY = {
    "zero": lambda plan, x: plan(torch._efficientzerotensor(x.shape)),
    "freed": lambda plan, x: plan(freed(x, 0)),
    "freed_view": lambda plan, x: plan(freed(x, 1)),
    "fake": lambda plan, x: plan(FakeTensorMode().from_tensor(x)),
    "functional": lambda plan, x: torch.func.functionalize(plan)(x),
    "vmap": lambda plan, x: torch.func.vmap(plan)(x[None]),
    "jvp": lambda plan, x: torch.func.jvp(plan, (x,), (x,)),
}


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_input_without_memory_is_refused_by_name(simple, name):
    with pytest.raises(InvalidArgument, match=r"plan: input 'x' has no memory"):
        WITHOUT_MEMORY[name](*simple)


def test_output_that_a_mode_leaves_without_memory_is_refused(simple):
    plan, x = simple
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(InvalidArgument, match="an output has no memory"):
        plan(x)


def test_outputs_are_on_the_cpu_whatever_the_default_device(simple):
    plan, x = simple
    with torch.device("meta"):
        assert torch.equal(plan(x), plan(x.clone()))
        assert plan.describe()["steps"]


def test_nested_tensors_are_refused_by_name(simple):
    plan, x = simple
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(InvalidType, match="plan: x must be a dense tensor, got a nested one"):
            plan(torch.nested.nested_tensor([x[0], x[1]], layout=layout))


# ---- metadata that do not fit the plan

METADATA = {
    "place": {"output": {"value": 1}},
    "place_in_a_list": {"output": {"list": [{"value": 0}, {"value": -1}]}},
    "place_that_is_a_bool": {"output": {"value": False}},
    "place_that_is_a_float": {"output": {"value": 0.0}},
    "negative_size": {"example": [[-1, 3, 8, 8]]},
    "fixed_size": {"example": [[2, 4, 8, 8]]},
    "rank": {"example": [[2, 3, 8]]},
    "size_that_is_a_float": {"example": [[2, 3, 8.0, 8]]},
    "size_that_is_a_bool": {"example": [[True, 3, 8, 8]]},
    "huge_size": {"example": [[2**63, 3, 8, 8]]},
    "text_as_sizes": {"example": ["abcd"]},
    "name": {"inputs": [3]},
    "two_names": {"inputs": ["x", "y"]},
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_do_not_fit_the_plan_are_refused(name):
    model, example = model_of(lambda y, x: y)
    network = lower_graph(model.graph, model, record(model, example)).network
    network.metadata["example"] = [list(example[0].shape)]
    assert torch.equal(Plan(bytes(plan_bytes(network)))(*example), model(*example))
    network.metadata.update(METADATA[name])
    with pytest.raises(CheckpointError, match="metadata of the plan are malformed"):
        Plan(bytes(plan_bytes(network)))


# ---- tracers

TRACERS = {
    "jit": lambda plan, x: torch.jit.trace(plan, x),
    "make_fx": lambda plan, x: make_fx(plan)(x),
    "make_fx_symbolic": lambda plan, x: make_fx(plan, tracing_mode="symbolic")(x),
    "make_fx_pre_dispatch": lambda plan, x: make_fx(plan, pre_dispatch=True)(x),
}


@pytest.mark.parametrize("name", TRACERS)
def test_tracers_are_refused(simple, name):
    with pytest.raises(Unsupported, match="plan: cannot be traced; trace the converted modules"):
        TRACERS[name](*simple)


def test_modes_that_only_watch_are_served(simple):
    plan, x = simple
    expected = plan(x)
    with FlopCounterMode(display=False):
        assert torch.equal(plan(x), expected)


# ---- arguments


def test_profile_and_describe_take_arguments_as_a_call_does(simple):
    plan, x = simple
    assert plan.describe(x=x) == plan.describe(x)
    assert plan.profile(x=x, runs=1).steps[0].name == plan.profile(x, runs=1).steps[0].name
    for method in (plan, plan.describe, plan.profile):
        with pytest.raises(InvalidArgument, match="plan: expected 1 inputs, got 2"):
            method(x, x)
        with pytest.raises(InvalidArgument, match=r"not expected: \['z'\]"):
            method(z=x)


def test_profile_of_an_empty_batch_is_shown(tmp_path):
    plan, _, x = plan_of(lambda y, x: y)
    profile = plan.profile(x[:0], runs=1)
    assert "call takes" in str(profile)
    profile.save(tmp_path / "profile.html")
    assert (tmp_path / "profile.html").stat().st_size > 100


# ---- what becomes an island

ISLANDS = {
    "view_as_a_dtype": lambda y, x: y.view(torch.int32),
    "step_that_a_call_decides": lambda y, x: y[:, :, :: x.shape[0]],
    "true_as_an_index": lambda y, x: y[True],
}


@pytest.mark.parametrize("name", ISLANDS)
def test_views_that_are_no_steps_are_islands(name):
    plan, model, x = plan_of(ISLANDS[name])
    assert len(plan.islands) == 1
    for given in (x, x[:1]):
        assert torch.equal(plan(given), model(given))


class Buffered(Net):
    """`what(convolved, a number)`, the number in a tensor."""

    def __init__(self, what, dtype):
        super().__init__(what)
        self.register_buffer("two", torch.tensor(2, dtype=dtype))

    def forward(self, x):
        return self.what(self.conv(x), self.two)


NUMBERS = {
    "stop": lambda y, k: y[:, :k],
    "index": lambda y, k: y[:, k],
    "select": lambda y, k: y.select(1, k),
    "narrow": lambda y, k: y.narrow(1, 0, k),
    "pad": lambda y, k: F.pad(y, (0, k)),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("name", NUMBERS)
def test_tensors_as_indices_and_sizes_are_islands(name, dtype):
    example = tensors([(2, 3, 8, 8)])
    if name == "index" and dtype is torch.uint8:
        pytest.skip("a mask")
    model = converted(Buffered(NUMBERS[name], dtype), *example)
    plan = qkernels.compile(model, tuple(example))
    assert len(plan.islands) == 1
    for given in (*example, example[0][:1]):
        assert torch.equal(plan(given), model(given))


class PadsIntegers(Net):
    def forward(self, x, y):
        return self.conv(x), F.pad(y, (1, 1), value=self.what)


def test_integers_are_padded_with_zero_by_a_step_and_else_by_torch():
    example = (*tensors([(2, 3, 8, 8)]), torch.ones(2, 3, dtype=torch.int32))
    for value, islands in ((0, set()), (3, {"pad"})):
        model = converted(PadsIntegers(value), *example)
        plan = qkernels.compile(model, example)
        assert torch.equal(plan(*example)[1], model(*example)[1])
        assert set(plan.islands) == islands


def test_more_than_six_dimensions_are_an_island():
    plan, model, x = plan_of(lambda y, x: torch.relu(y.reshape(x.shape[0], 2, 2, 2, 2, 4, 2, 4).flatten(1)))
    assert set(plan.islands) >= {"reshape"}
    for given in (x, x[:1]):
        assert torch.equal(plan(given), model(given))


def test_parts_of_what_is_empty_are_steps():
    plan, model, x = plan_of(lambda y, x: (y[:, 8:].chunk(3, 1), y[:, 8:].split(2, 1), y[:, 7:].split(2, 1)))
    got, expected = plan(x), model(x)
    assert isinstance(plan, qkernels.Plan)
    assert [[part.shape for part in parts] for parts in got] == [[part.shape for part in parts] for parts in expected]


def test_model_that_returns_no_tensor_is_refused():
    model, example = model_of(lambda y, x: None)
    with pytest.raises(Unsupported, match=r"compile: the model returns no tensor.*call it as it is"):
        qkernels.compile(model, tuple(example))


# ---- sizes and indices that a call decides

# [2, 8, H, W], and heights for which the modules give a result or raise an error
COMPUTED = {
    "select": (lambda y, x: torch.select(y, 1, x.shape[2] - 9), (8, 9, 10, 1), (17, 0)),
    "select_method": (lambda y, x: y.select(1, x.shape[2] - 9), (8, 9, 16), (17,)),
    "index": (lambda y, x: y[:, x.shape[2] - 9], (8, 9, 10, 1), (17,)),
    "index_too_far": (lambda y, x: y[:, :, 5], (8, 6), (5, 1)),
    "index_from_the_end": (lambda y, x: y[:, :, -5], (8, 5), (4, 1)),
    "select_from_the_end": (lambda y, x: y.select(2, -5), (8, 5), (4, 1)),
    "narrow": (lambda y, x: y.narrow(1, x.shape[2] - 9, 1), (8, 9, 10, 1), (17,)),
    "narrow_from_the_end": (lambda y, x: y.narrow(2, -4, 3), (8, 4), (3, 1)),
    "narrow_length": (lambda y, x: y.narrow(1, 2, x.shape[2] - 3), (8, 3, 9), (2, 10)),
    "split": (lambda y, x: y.split([x.shape[2] - 2, 10 - x.shape[2]], 1), (8, 2, 10), (1, 11, 12)),
    "split_sum": (lambda y, x: y.split([x.shape[2] - 2, 2], 1)[0], (8,), (7, 9)),
    "pixel_unshuffle": (lambda y, x: F.pixel_unshuffle(y, 2), (8, 6), (7, 5)),
}


def result_of(call):
    """The result, or the error."""
    try:
        return call()
    except (RuntimeError, IndexError, ValueError) as error:
        return error


@pytest.mark.parametrize("name", COMPUTED)
def test_what_a_call_decides_is_checked_as_torch_does_it(name):
    what, fits, others = COMPUTED[name]
    plan, model, _ = plan_of(what)
    assert isinstance(plan, qkernels.Plan)
    for height in fits:
        (given,) = tensors([(2, 3, height, 8)])
        for got, expected in zip(leaves(plan(given)), leaves(model(given)), strict=True):
            assert torch.equal(got, expected)
    for batch, height in ((batch, height) for batch in (2, 0) for height in others):
        given = torch.zeros(batch, 3, height, 8)
        assert isinstance(result_of(lambda: model(given)), Exception)  # noqa: B023
        with pytest.raises(InvalidArgument, match="plan: step"):
            plan(given)


@pytest.mark.parametrize("number", [float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_returned(number):
    plan, model, x = plan_of(lambda y, x: (y, [number]))
    assert torch.equal(plan(x)[0], model(x)[0])
    assert plan(x)[1] == [number]


# ---- islands that write in place

OVERWRITING = {
    "result": lambda y, x: (y, torch.threshold_(y, 0.1, 0.0)),
    "view": lambda y, x: (torch.threshold_(y[:, :4], 0.1, 0.0), x),
    "out": lambda y, x: (y, torch.abs(y, out=y)),
    "part_of_the_input": lambda y, x: (y, torch.threshold_(x[:, :2], 0.1, 0.0)),
    "view_of_the_input": lambda y, x: torch.threshold_(x.flatten(1)[:, :2], 0.1, 0.0),
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_writing_in_place_gives_the_numbers_of_the_modules_and_keeps_the_input(name):
    plan, model, x = plan_of(OVERWRITING[name])
    for given in (x, x[:1] * 2):
        before = given.clone()
        for got, expected in zip(leaves(plan(given)), leaves(model(given)), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(given, before)


def test_writing_in_place_to_what_nobody_else_reads_is_an_island():
    plan, model, x = plan_of(lambda y, x: torch.threshold_(y.reshape(y.shape[0], -1), 0.1, 0.0))
    assert set(plan.islands) == {"threshold_"}
    for given in (x, x[:1] * 2):
        assert torch.equal(plan(given), model(given))
