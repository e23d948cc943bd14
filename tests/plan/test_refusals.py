"""What a plan cannot do ends in a typed error or in an island: no crash, no silent wrong answer."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import converted, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import qkernels
from qkernels.errors import InvalidArgument, Unsupported

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
}


@pytest.mark.parametrize("name", ISLANDS)
def test_views_that_are_no_steps_are_islands(name):
    plan, model, x = plan_of(ISLANDS[name])
    assert len(plan.islands) == 1
    for given in (x, x[:1]):
        assert torch.equal(plan(given), model(given))


@pytest.mark.parametrize("number", [float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_returned(number):
    plan, model, x = plan_of(lambda y, x: (y, [number]))
    assert torch.equal(plan(x)[0], model(x)[0])
    assert plan(x)[1] == [number]


# ---- islands that write in place; none of them changes a number of the example

OVERWRITING = {
    "result": (lambda y, x: (y, torch.threshold_(y, -200.0, 0.0)), "threshold_ writes in place to conv, .*returns"),
    "view": (lambda y, x: (y, torch.threshold_(y[:, :4], -200.0, 0.0)), "threshold_ writes in place to conv"),
    "out": (lambda y, x: (y, torch.abs(y, out=y)), "abs_1 writes in place to conv"),
    "other_view": (
        lambda y, x: (torch.threshold_(y[:, :4], -200.0, 0.0), y[:, 2:]),
        "threshold_ writes in place to conv",
    ),
    "part_of_the_input": (lambda y, x: (y, torch.threshold_(x[:, :2], -200.0, 0.0)), "threshold_ writes in place to x"),
    "view_of_the_input": (
        lambda y, x: torch.threshold_(x.flatten(1)[:, :2], -200.0, 0.0),
        "threshold_ writes in place to a part of x",
    ),
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_writing_in_place_to_what_others_read_is_refused(name):
    what, message = OVERWRITING[name]
    model, example = model_of(what)
    with pytest.raises(Unsupported, match=f"compile: {message}"):
        qkernels.compile(model, tuple(example))


def test_writing_in_place_to_what_nobody_else_reads_is_an_island():
    plan, model, x = plan_of(lambda y, x: torch.threshold_(y.reshape(y.shape[0], -1), 0.1, 0.0))
    assert set(plan.islands) == {"threshold_"}
    for given in (x, x[:1] * 2):
        assert torch.equal(plan(given), model(given))
