"""Models and habits at the edges: what `convert` gives is what was prepared, or the difference is said."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.errors import InvalidArgument


def calibrated(model, batches, recipe="int8"):
    return qkernels.calibrate(qkernels.prepare(model.eval(), batches[0], recipe), batches)


def converts_faithfully(model, batches):
    """Asserts that the integers stay as close to the simulation as a rounding of the output."""
    prepared = calibrated(model, batches)
    converted = qkernels.convert(prepared)
    for x in batches:
        expected = prepared(x).detach()
        torch.testing.assert_close(converted(x), expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    return prepared, converted


def mlp(*between):
    return nn.Sequential(nn.Linear(8, 8), *between, nn.Linear(8, 4))


class LearnedPosition(nn.Module):
    """Adds a Parameter, on a grid of its own where `twice`."""

    def __init__(self, twice: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(16 if twice else 8, 4)
        self.position, self.twice = nn.Parameter(torch.randn(4, 8)), twice

    def forward(self, x):
        position, h = self.position, self.first(x) * 10
        return self.last(torch.cat([h + position, position], 1) if self.twice else h + position)


class WithConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("shift", torch.randn(8), persistent=False)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x) + self.inner.shift + torch.tensor([0.5]))


@pytest.mark.parametrize("model", [LearnedPosition, functools.partial(LearnedPosition, True), WithConstant])
def test_a_model_that_adds_its_own_tensors_is_saved_and_loaded(model, tmp_path):
    batches = [torch.randn(4, 8) for _ in range(3)]
    _, converted = converts_faithfully(model(), batches)
    qkernels.save(converted, tmp_path / "model")
    loaded = qkernels.load(tmp_path / "model")
    assert torch.equal(loaded(batches[0]), converted(batches[0]))
    assert not [name for name, t in converted.state_dict().items() if t.is_floating_point() and t.numel() == 32]


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("path", ["0", "1", "2", "3"])
def test_a_layer_with_forward_hooks_stays_float_and_says_so(path, pre):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    layer = model.get_submodule(path)
    if pre:
        layer.register_forward_pre_hook(lambda module, args: args[0] * 2)
    else:
        layer.register_forward_hook(lambda module, args, out: out * 2 + 1)
    prepared, _ = converts_faithfully(model, [torch.randn(4, 3, 8, 8) for _ in range(3)])
    assert [row.reason for row in prepared.report if row.name == path] == [
        "has forward hooks, which an integer layer would not run"
    ]


def test_interpolation_that_computes_its_scale_again_chooses_the_same_pixels():
    def model(layer):
        return nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1))

    batches = [torch.randn(2, 3, 11, 11) for _ in range(2)]
    converts_faithfully(model(nn.Upsample(scale_factor=1.3)), batches)
    converts_faithfully(model(nn.Upsample(scale_factor=1.3, recompute_scale_factor=True)), batches)


@pytest.mark.parametrize("recipe", ["int8-bias", "w4a8-adaround"])
@pytest.mark.parametrize("change", [qkernels.disable_fake_quant, qkernels.enable_observer, qkernels.freeze])
def test_convert_gives_the_same_in_every_phase(recipe, change):
    torch.manual_seed(0)
    batches = [torch.randn(64, 8) for _ in range(3)]
    prepared = calibrated(mlp(nn.ReLU()), batches, recipe)
    expected = qkernels.convert(prepared).state_dict()
    change(prepared)
    got = qkernels.convert(prepared).state_dict()
    assert all(torch.equal(got[name], t) for name, t in expected.items() if isinstance(t, torch.Tensor))


class ViewsBetweenParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(400, 5)

    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 1e9:
            y = y * 2
        return self.linear(y.view(y.size(0), -1))


def test_code_between_parts_may_view_their_outputs():
    x = torch.randn(2, 3, 12, 12)
    converts_faithfully(ViewsBetweenParts(), [x])
    trained = qkernels.prepare_qat(ViewsBetweenParts(), x)
    for _ in range(2):
        trained(x).sum().backward()
    assert qkernels.convert(trained.eval())(x).shape == (2, 5)


class WritesToAView(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.first, self.last, self.write = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), write
        nn.init.constant_(self.first.bias, 1.0)

    def forward(self, x):
        y = self.first(x)
        self.write(y[:, :4].transpose(1, 2))
        return self.last(y)


@pytest.mark.parametrize("write", [torch.relu_, lambda y: y.relu_(), functools.partial(F.relu, inplace=True)])
def test_writing_to_a_view_is_seen_by_who_reads_the_whole(write):
    nothing_to_write = torch.zeros(2, 3, 6, 6)  # an example on which the graph without the write gives the same
    batches = [torch.randn(2, 3, 6, 6) * 3 for _ in range(3)]
    model = WritesToAView(write).eval()
    converted = qkernels.convert(qkernels.calibrate(qkernels.prepare(model, nothing_to_write), batches))
    for x in batches:
        expected = model(x).detach()
        torch.testing.assert_close(converted(x), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_a_layer_named_like_a_view_is_a_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.expand(x)) + x

    prepared, _ = converts_faithfully(Block(), [torch.randn(2, 3, 6, 6)])
    assert "no graph" not in str(prepared.report)


def test_an_average_of_models_made_before_training_runs_with_the_grids_it_was_given():
    trained = qkernels.prepare_qat(mlp(nn.ReLU()), torch.randn(4, 8))
    average = torch.optim.swa_utils.AveragedModel(trained)
    for _ in range(3):
        trained(torch.randn(4, 8)).sum().backward()
        average.update_parameters(trained)
    x = torch.randn(4, 8)
    expected = qkernels.convert(copy.deepcopy(average.module).eval())(x)
    torch.testing.assert_close(average.eval()(x), expected, atol=0.02, rtol=0)


def test_frozen_grids_stay_frozen_while_fake_quant_is_off():
    trained = qkernels.prepare_qat(mlp(nn.ReLU()), torch.randn(4, 8))
    trained(torch.randn(4, 8))
    qkernels.freeze(trained)
    scales = {name: t.clone() for name, t in trained.named_buffers() if name.endswith("scale")}
    qkernels.disable_fake_quant(trained)
    x = torch.randn(4, 8)
    weights = [m for m in trained.modules() if isinstance(m, nn.Linear)]
    floats = F.linear(F.relu(F.linear(x, weights[0].weight, weights[0].bias)), weights[1].weight, weights[1].bias)
    assert torch.equal(trained(x), floats)
    qkernels.calibrate(trained, [torch.randn(4, 8) * 10])
    qkernels.enable_fake_quant(trained)
    qkernels.calibrate(trained, [torch.randn(4, 8) * 10])
    assert all(torch.equal(t, scales[name]) for name, t in trained.named_buffers() if name in scales)


def test_a_trained_linear_takes_a_vector():
    trained = qkernels.prepare_qat(mlp(), torch.randn(4, 8))
    for _ in range(2):
        trained(torch.randn(4, 8)).sum().backward()
    x = torch.randn(8, requires_grad=True)
    trained.eval()(x).sum().backward()
    one = x.grad.clone()
    rows = x.detach()[None].requires_grad_()
    trained(rows).sum().backward()
    torch.testing.assert_close(one[None], rows.grad)


def test_a_calibrated_model_in_training_mode_rounds_where_observers_are_on():
    prepared = calibrated(mlp(), [torch.randn(4, 8)])
    x = torch.randn(4, 8)
    expected = prepared(x)
    qkernels.enable_observer(prepared)
    assert torch.equal(prepared.train()(x), expected)


def test_a_converted_model_is_not_prepared_again():
    x = torch.randn(4, 8)
    converted = qkernels.convert(calibrated(mlp(), [x]))
    with pytest.raises(InvalidArgument, match="prepare: the model is converted already"):
        qkernels.prepare(converted, x)


def test_a_model_without_inputs_stays_float_and_says_so():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("x", torch.ones(1, 3))

        def forward(self):
            return self.linear(self.x)

    model = Constant().eval()
    prepared = qkernels.prepare(model, ())
    assert "takes no inputs" in str(prepared.report)
    assert prepared().shape == (1, 3)


class SharedActivation(nn.Module):
    """One module for an activation on codes and one that stays float."""

    def __init__(self, activation, is_shared):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.act = activation()
        self.last = self.act if is_shared else activation()

    def forward(self, x):
        return self.last(self.second(self.act(self.first(x))))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardtanh])
def test_an_activation_shared_by_an_integer_and_a_float_call_is_as_good_as_two(activation):
    torch.manual_seed(0)
    shared, x = SharedActivation(activation, True).eval(), torch.randn(32, 8)
    separate = SharedActivation(activation, False).eval()
    separate.load_state_dict(shared.state_dict())
    results = []
    for model in (shared, separate):
        prepared = calibrated(model, [x])
        converted = qkernels.convert(prepared)
        assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
        assert torch.equal(qkernels.compile(converted, x)(x), converted(x))
        results.append(converted(x))
    assert torch.equal(*results)


class Features(nn.Module):
    """A shared ReLU of which one call reads a float input and is read by the output alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        early, y = self.relu(x), self.conv(x)
        return early, self.left(self.relu(y)), self.right(y)


def test_a_float_call_of_a_shared_module_leaves_its_integer_layer_alone():
    torch.manual_seed(0)
    model, x = Features().eval(), torch.randn(2, 2, 8, 8)
    converted = qkernels.convert(calibrated(model, [x]))
    for expected, found in zip(model(x), converted(x), strict=True):
        assert 10 * torch.log10(expected.square().sum() / ((expected - found).square().sum() + 1e-20)) > 35


@pytest.mark.parametrize(
    "function", [lambda x: 1 - x, lambda x: (255 - x) / 255, lambda x: 2 / (x + 1), lambda x: 2**x]
)
def test_a_number_may_come_first_in_front_of_a_layer(function):
    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(function(x))

    torch.manual_seed(0)
    model, x = Inverted().eval(), torch.rand(2, 3, 8, 8)
    converted = qkernels.convert(calibrated(model, [x]))
    torch.testing.assert_close(converted(x), model(x), rtol=0, atol=0.05)
