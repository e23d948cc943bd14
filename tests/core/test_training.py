"""Training with quantization: what is simulated, what is frozen, and what convert makes of it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels
from qkernels.core.layers import Prepared
from qkernels.core.norm import Norm
from qkernels.core.prepare import quantizers
from qkernels.core.quantizer import State
from qkernels.errors import InvalidArgument, InvalidState


def conv_bn_relu(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False, **options),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(6 * 9, 5),
    )


def images(seed: int = 1, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int, first: int = 0, lr: float = 0.05) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = (model(images(step)) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


GRANULARITIES = ["per_channel", "per_tensor"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_training_lowers_the_loss_and_converts_without_a_mismatch(granularity):
    model = qkernels.prepare_qat(conv_bn_relu(), images(), forward="float", weight_granularity=granularity)
    losses = train(model, 12)
    assert losses[-1] < losses[0]
    converted = qkernels.convert(model)
    assert qkernels.verify(model, converted, [images(7), images(8, batch=1)]).total_mismatches == 0
    assert type(converted.get_submodule("0")).__name__ == "QConv"
    # codes may differ by one where the simulation and the integers round a tie differently
    with torch.no_grad():
        simulated, integer = model.eval()(images(9)), converted(images(9))
    assert (simulated - integer).abs().max() < 0.1 * simulated.abs().max()


def test_the_model_itself_is_not_touched():
    model = conv_bn_relu()
    before = copy.deepcopy(model.state_dict())
    train(qkernels.prepare_qat(model, images(), forward="float"), 2)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_batch_norm_in_training_is_that_of_the_float_model(granularity):
    """With fake-quantization off, one step gives the losses, gradients and running statistics of the float model."""
    model = conv_bn_relu()
    del model[7]  # dropout is random
    qat = qkernels.prepare_qat(model, images(), forward="float", weight_granularity=granularity)
    qkernels.disable_fake_quant(qat)
    expected, got = model(images(3)), qat(images(3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    layer = qat.get_submodule("0")
    torch.testing.assert_close(layer.weight.grad, model[0].weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.norm.weight.grad, model[1].weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.norm.running_mean, model[1].running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.norm.running_var, model[1].running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_channel_that_gamma_switches_off_trains_and_converts(granularity):
    model = conv_bn_relu()
    with torch.no_grad():
        model[1].weight[:3] = torch.tensor([0.0, -1.0, 1e-30])
    qat = qkernels.prepare_qat(model, images(), forward="float", weight_granularity=granularity)
    assert all(torch.isfinite(torch.tensor(train(qat, 3))))
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0
    with torch.no_grad():
        qat.get_submodule("0").norm.weight[:2] = 0.0
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


def test_frozen_norms_keep_their_statistics_and_still_train():
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), forward="float")
    train(qat, 2)
    qkernels.freeze_bn(qat)
    norm = qat.get_submodule("0").norm
    mean, gamma = norm.running_mean.clone(), norm.weight.detach().clone()
    train(qat, 2, first=2)
    assert torch.equal(norm.running_mean, mean)
    assert not torch.equal(norm.weight, gamma)
    qat.apply(qkernels.unfreeze_bn)
    train(qat, 1)
    assert not torch.equal(norm.running_mean, mean)


def test_a_norm_without_a_layer_before_it_trains_and_converts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    qat = qkernels.prepare_qat(model, images(), forward="float")
    mean = qat.get_submodule("2").norm.running_mean.clone()
    train(qat, 3)
    assert not torch.equal(qat.get_submodule("2").norm.running_mean, mean)
    assert all(row.integer for row in qat.report)
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


def test_a_norm_behind_a_layer_that_stays_float_stays_a_norm():
    model = conv_bn_relu()
    qat = qkernels.prepare_qat(model, images(), forward="float", skip=["0", "1"])
    train(qat, 2)
    assert isinstance(qat.get_submodule("1"), nn.BatchNorm2d)
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d, (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (3, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (3, 4, 4, 5, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), nn.BatchNorm1d, (3, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d, (3, 4, 5, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), nn.BatchNorm3d, (3, 4, 3, 2, 3)),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("forward", ["float", "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_trains_with_a_norm_and_converts_without_a_mismatch(kind, forward, granularity):
    make, norm, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make(), norm(6), nn.Hardswish(), make_tail(kind))
    qat = qkernels.prepare_qat(model, torch.randn(shape), forward=forward, weight_granularity=granularity)
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        qat(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in qat.parameters())
    assert qkernels.verify(qat, qkernels.convert(qat), [torch.randn(shape)]).total_mismatches == 0


def make_tail(kind: str) -> nn.Module:
    return nn.Linear(6, 2) if kind == "linear" else getattr(nn, f"Conv{kind[-2]}d")(6, 2, 1)


def test_phases_say_what_happens():
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), forward="float")
    assert {q.state for q in quantizers(qat)} == {State.TRAIN}
    train(qat, 1)
    with qkernels.phase(qat, qkernels.disable_observer, qkernels.freeze_bn):
        before = [q.scale.clone() for q in quantizers(qat)]
        qat(10 * images(4))
        assert all(torch.equal(q.scale, b) for q, b in zip(quantizers(qat), before, strict=True))
        assert all(m.frozen for m in qat.modules() if isinstance(m, Norm))
    assert {q.state for q in quantizers(qat)} == {State.TRAIN}
    with qkernels.phase(qat, qkernels.disable_fake_quant):
        assert {q.state for q in quantizers(qat)} == {State.OBSERVE}
    qat.apply(qkernels.freeze)
    assert {q.state for q in quantizers(qat)} == {State.FROZEN}
    qat.apply(qkernels.enable_observer)
    assert {q.state for q in quantizers(qat)} == {State.FROZEN}


@pytest.mark.parametrize("apply", [True, False])
def test_rounding_begins_on_grids_for_what_passed_before(apply):
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), forward="float")
    qat.apply(qkernels.disable_fake_quant) if apply else qkernels.disable_fake_quant(qat)
    train(qat, 2)
    qat.eval()(10 * images(4))
    qat.apply(qkernels.enable_fake_quant) if apply else qkernels.enable_fake_quant(qat)
    assert {q.state for q in quantizers(qat)} == {State.TRAIN}
    for layer in (m for m in qat.modules() if isinstance(m, Prepared)):
        torch.testing.assert_close(layer.quantizers["weight"].observer.high.max(), layer.observed_weight().max())
    output = qat(images(5))
    assert len(output.unique()) <= 256
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


@pytest.mark.parametrize("rule", ["ste", "lsq", "lsq_plus", "range"])
def test_weights_that_grew_before_the_start_step_get_grids_for_what_they_are(rule):
    """200 steps in float make them ten times as large."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = 10 * x[:, :1]
    model = qkernels.prepare_qat(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)), x, rule=rule, start_step=200
    )
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "rule" not in name], lr=0.05)
    for i in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if i < 199:
            with torch.no_grad():
                assert torch.equal((model.eval()(x) - y).square().mean(), loss)  # float in eval mode too
            model.train()
        loss.backward()
        optimizer.step()
    model(x)
    with torch.no_grad():
        rounded = (model.eval()(x) - y).square().mean()
    assert loss < 0.01
    assert rounded < 1.0  # 119 on the grids of the beginning
    assert qkernels.verify(model, qkernels.convert(model), [x]).total_mismatches == 0


def test_until_the_start_step_training_is_float():
    model = conv_bn_relu()
    del model[7]
    qat = qkernels.prepare_qat(model, images(), forward="float", start_step=2)
    for step in range(2):
        torch.testing.assert_close(qat(images(step)), model(images(step)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(qat(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward", ["int8", "float"])
@pytest.mark.parametrize("rule", ["ste", "lsq", "lsq_plus", "range", "pact"])
def test_the_last_step_before_rounding_chooses_the_grids(rule, forward):
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), rule=rule, forward=forward, start_step=2)
    train(qat, 2)
    x = images(5)
    assert qkernels.verify(qat, qkernels.convert(qat), [x]).total_mismatches == 0
    qat.eval()
    with torch.no_grad():
        first = qat(x)
        assert torch.equal(first, qat(x))
        assert forward == "float" or torch.equal(first, qkernels.exact(qat)(x))
    again = qkernels.prepare_qat(conv_bn_relu(), images(), rule=rule, forward=forward, start_step=2)
    again.load_state_dict(qat.state_dict())
    losses = []
    for model in (qat.train(), again):
        torch.manual_seed(1)  # for dropout
        losses.append(train(model, 2))
    assert losses[0] == losses[1]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.cat([F.relu(self.left(x)), F.relu(self.right(x)), x], 1)


@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_the_branches_of_a_concatenation_are_one_step_of_the_delay(rule):
    float_model = Branches()
    qat = qkernels.prepare_qat(float_model, images(), rule=rule, start_step=4)
    for step in range(4):
        assert {q.delay for q in quantizers(qat)} == {4 - step}
        torch.testing.assert_close(qat(images(step)), float_model(images(step)), rtol=1e-4, atol=1e-5)
    assert {q.delay for q in quantizers(qat)} == {0}
    output = qat(images(4))
    assert not torch.allclose(output, float_model(images(4)), rtol=1e-4, atol=1e-5)
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


def test_calibration_sets_the_grids_of_a_model_in_training():
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), forward="float").eval()
    with pytest.raises(InvalidState, match="no grid yet"):
        qat(images())
    with qkernels.calibrating(qat):
        qat(images())
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


def test_reestimated_norms_have_the_statistics_of_the_batches():
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), forward="float")
    train(qat, 3)
    layer = qat.get_submodule("0")
    qkernels.reestimate_bn(qat, [images(20), images(21)])
    with torch.no_grad(), qkernels.phase(qat, qkernels.disable_observer):
        x = torch.stack(
            [qat.get_submodule("activation_quantizers").get_submodule("input_1")(images(s)) for s in (20, 21)]
        )
        y = F.conv2d(x.flatten(0, 1), layer.quantizers["weight"].on_grid(layer.weight), padding=1)
    torch.testing.assert_close(layer.norm.running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert layer.norm.momentum == 0.1


@pytest.mark.parametrize("size", [30.0, 0.003])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_reestimated_norms_do_not_start_from_nothing(granularity, size):
    """The grid of a weight that is folded before it is rounded belongs to the statistics that it was trained under."""
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), weight_granularity=granularity)
    norm = qat.get_submodule("0").norm
    norm.momentum = 0.5
    for seed in range(40):
        qat(size * images(seed))
    expected = norm.running_var.clone()
    qkernels.reestimate_bn(qat, [size * images(seed) for seed in range(50, 54)])
    torch.testing.assert_close(norm.running_var, expected, rtol=0.3, atol=0)
    assert norm.num_batches_tracked == 4


def test_norms_are_not_reestimated_from_nothing():
    qat = qkernels.prepare_qat(conv_bn_relu(), images())
    train(qat, 2)
    before = {name: tensor.clone() for name, tensor in qat.state_dict().items()}
    with pytest.raises(InvalidArgument, match="from no batches"):
        qkernels.reestimate_bn(qat, iter(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in qat.state_dict().items())


@pytest.mark.parametrize("rule", ["lsq", "pact", "range", "ste"])
def test_frozen_grids_stay_whatever_is_trained(rule):
    qat = qkernels.prepare_qat(conv_bn_relu(), images(), rule=rule)
    train(qat, 2)
    qkernels.freeze(qat)
    before = [q.qparams() for q in quantizers(qat)]
    train(qat, 3)
    for old, quantizer in zip(before, quantizers(qat), strict=True):
        assert torch.equal(old.scale, quantizer.qparams().scale)
        assert torch.equal(old.zero_point, quantizer.qparams().zero_point)


def test_grids_that_are_not_in_use_are_frozen_too():
    qat = qkernels.prepare_qat(conv_bn_relu(), images())
    train(qat, 2)
    qkernels.disable_fake_quant(qat)
    qkernels.freeze(qat)
    before = [q.qparams() for q in quantizers(qat)]
    qat(5 * images())
    qkernels.enable_fake_quant(qat)
    assert all(torch.equal(old.scale, q.qparams().scale) for old, q in zip(before, quantizers(qat), strict=True))


def test_learned_grids_before_norms_without_statistics_are_warned_of():
    with pytest.warns(UserWarning, match="have seen no batch yet"):
        qkernels.prepare_qat(conv_bn_relu(), images(), rule="lsq", weight_granularity="per_tensor")
    for options in ({"rule": "lsq"}, {"weight_granularity": "per_tensor"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qkernels.prepare_qat(conv_bn_relu(), images(), **options)


def test_inference_mode_is_no_place_to_begin_training():
    with torch.inference_mode(), pytest.raises(InvalidState, match="inference_mode"):
        qkernels.prepare_qat(conv_bn_relu(), images())


def test_shared_layers_train_as_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    qat = qkernels.prepare_qat(Twice(), images(), forward="float")
    assert len(list(qat.parameters())) == 2
    train(qat, 2)
    assert qkernels.verify(qat, qkernels.convert(qat), [images(5)]).total_mismatches == 0


@pytest.mark.parametrize("forward", ["int8", "float"])
@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_recomputed_activations_give_the_same_gradients_once_the_grids_stand(rule, forward):
    model = qkernels.prepare_qat(conv_bn_relu(), images(), rule=rule, forward=forward).train()
    with torch.no_grad():
        model(images())
    qkernels.disable_observer(model)  # a recomputation is a second batch for them
    twin = copy.deepcopy(model)
    for one, run in ((model, lambda x: checkpoint(model, x, use_reentrant=False)), (twin, twin)):
        torch.manual_seed(2)
        run(images(2)).square().sum().backward()
        assert all(p.grad is not None for p in one.parameters() if p.requires_grad)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


def test_bad_arguments_are_named():
    with pytest.raises(InvalidArgument, match="forward must be one of"):
        qkernels.prepare_qat(conv_bn_relu(), images(), forward="int4")
    with pytest.raises(InvalidArgument, match="start_step"):
        qkernels.prepare_qat(conv_bn_relu(), images(), start_step=-1)
    with pytest.raises(InvalidArgument, match="unknown rule"):
        qkernels.prepare_qat(conv_bn_relu(), images(), rule="nothing")
    with pytest.raises(InvalidArgument, match="prepared already"):
        qkernels.prepare_qat(qkernels.prepare_qat(conv_bn_relu(), images()), images())


def test_every_weighted_layer_is_wrapped_once():
    qat = qkernels.prepare_qat(conv_bn_relu(), images())
    assert sum(isinstance(m, Prepared) for m in qat.modules()) == 3
