"""Training on integers says what it cannot do, and follows every change of what it is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import qkernels
from qkernels.core.norm import Freezable
from qkernels.core.prepare import prepared_layers
from qkernels.errors import CalibrationError, InvalidState, InvalidType


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def at_rest(**options) -> nn.Module:
    """A network in training mode whose grids stay."""
    qat = qkernels.prepare_qat(network(), rows(), **options)
    qat(rows())
    qkernels.disable_observer(qat)
    return qat


# --- derivatives of the second order ---------------------------------------------------------------------------------


def penalty(forward: str, convolution: bool) -> nn.Module:
    first = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)] if convolution else [*network()]
    x = images() if convolution else rows()
    qat = qkernels.prepare_qat(nn.Sequential(*first), x, forward=forward)
    qat(x)
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(qat(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    return qat


@pytest.mark.parametrize("convolution", [False, True])
def test_the_gradient_of_the_integer_forward_is_not_differentiated_in_silence(convolution):
    refusal = "forward='int8' of prepare_qat: its gradient cannot be differentiated again"
    with pytest.raises(RuntimeError, match=refusal):
        penalty("int8", convolution)
    qat = penalty("float", convolution)
    assert all(layer.weight.grad.any() for layer in prepared_layers(qat))


def test_nor_is_it_for_chosen_parameters():
    qat, x = qkernels.prepare_qat(network(), rows()), rows().requires_grad_()
    (grad,) = torch.autograd.grad(qat(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grad.square().sum(), qat.get_parameter("4.weight"))


# --- the exact forward -----------------------------------------------------------------------------------------------


def flip(qat: nn.Module) -> None:
    for layer in prepared_layers(qat):
        layer.weight.data.copy_(layer.weight.data.flip(1).clone())


def halve(qat: nn.Module) -> None:
    for layer in prepared_layers(qat):
        layer.weight.data.mul_(0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", [flip, halve])
def test_an_edit_past_autograd_reaches_the_exact_forward(edit, training):
    qat = at_rest(weight_rule="lsq").train(training)  # a learned grid does not move with the weight
    before = qat(rows())
    edit(qat)
    after = qat(rows())
    assert not torch.equal(before, after)
    assert torch.equal(after, qkernels.exact(qat)(rows()))


def test_functional_call_computes_with_the_tensors_that_it_is_given():
    qat = at_rest()
    first = {name: p.detach().clone() for name, p in qat.named_parameters()}
    second = {name: p * 0.5 for name, p in first.items()}
    torch.func.functional_call(qat, first, rows())
    got = torch.func.functional_call(qat, second, rows())
    qat.load_state_dict(qat.state_dict() | second)
    assert torch.equal(got, qkernels.exact(qat)(rows()))


# --- convert ---------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Parameters that no layer owns, one of them also that of a layer that stays float."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 8), nn.Linear(8, 2), nn.LayerNorm(8)
        self.factor, self.shift = nn.Parameter(torch.randn(8)), self.norm.bias

    def forward(self, x):
        return self.last((self.norm(self.first(x)) + self.shift) * self.factor.sigmoid())


def test_a_converted_model_shares_no_memory_with_the_one_that_trains_on():
    qat = qkernels.prepare_qat(Bare(), rows())
    qat(rows())
    converted = qkernels.convert(qat)
    assert converted.shift is converted.norm.bias
    before = converted(rows())
    optimizer = torch.optim.SGD(qat.parameters(), lr=1.0)
    qat(rows()).square().sum().backward()
    optimizer.step()
    assert torch.equal(converted(rows()), before)


def test_convert_takes_the_model_out_of_a_parallel_wrapper():
    qat = at_rest()
    wrapped = nn.DataParallel(qat)
    for verb in (qkernels.convert, qkernels.exact):
        assert not isinstance(verb(wrapped), nn.DataParallel)
        assert torch.equal(verb(wrapped)(rows()), verb(qat)(rows()))


@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
def test_convert_names_the_parameter_that_is_not_finite(name):
    qat = at_rest(rule="lsq")
    with torch.no_grad():
        qat.get_parameter(name).view(-1)[1] = float("nan")
    with pytest.raises(CalibrationError, match=f"convert: {name} has 1 NaN"):
        qkernels.convert(qat)


def test_convert_right_after_a_step_prunes_the_weight_of_now():
    qat = qkernels.prepare_qat(network(), rows())
    prune.l1_unstructured(qat.get_submodule("0"), "weight", 0.5)
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.1)
    qat(rows()).square().sum().backward()
    optimizer.step()
    converted = qkernels.convert(qat)
    assert torch.equal(converted(rows()), qat.eval()(rows()))


# --- hooks and batch normalizations ----------------------------------------------------------------------------------


def test_a_hook_on_a_layer_sees_its_output_before_the_clamp_and_the_grid():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)]
    x = images().to(memory_format=torch.channels_last)
    qat, seen = qkernels.prepare_qat(nn.Sequential(*layers), x), []
    qat(x)
    qat.get_submodule("0").register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    qat(x).sum().backward()
    assert bool((seen[0] < 0).any())
    assert len(seen[0].unique()) > 256


class Apart(nn.Module):
    """One batch normalization behind a convolution, and two that stay by themselves."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.norm = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.sync, self.last = nn.SyncBatchNorm(4), nn.Linear(144, 2)

    def forward(self, x):
        y = F.gelu(self.norm(self.conv(self.first(x))))
        return self.last(self.sync(y).flatten(1))


@pytest.fixture
def apart() -> nn.Module:
    torch.manual_seed(0)
    qat = qkernels.prepare_qat(Apart().eval(), images(), skip=["first"])
    qat(images())
    return qat


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def test_freeze_bn_stops_every_batch_normalization_and_survives_train_and_loading(apart):
    names = {"first", "conv.norm", "sync"}
    assert {name for name, m in apart.named_modules() if isinstance(m, Freezable)} == names
    qkernels.freeze_bn(apart)
    other = qkernels.prepare_qat(Apart().eval(), images(), skip=["first"])
    other.load_state_dict(apart.state_dict())
    for model in (apart, other):
        model.eval().train()
        before = statistics(model)
        assert len(before) == 6
        y = model(images(2) * 3)
        y.sum().backward()
        assert all(torch.equal(before[name], b) for name, b in statistics(model).items())
    qkernels.disable_observer(apart)
    in_training, in_eval = apart(images(3)), apart.eval()(images(3))
    assert torch.equal(in_training, in_eval)


def test_batch_normalizations_that_no_layer_takes_in_thaw_again(apart):
    with qkernels.phase(apart, qkernels.freeze_bn):
        assert not any(m.live for m in apart.modules() if isinstance(m, Freezable))
    qkernels.freeze_bn(apart)
    apart.apply(qkernels.unfreeze_bn)
    before = statistics(apart)
    apart.first(images(2) * 3)
    assert not torch.equal(before["first.running_mean"], apart.first.running_mean)


def test_reestimate_bn_reaches_batch_normalizations_that_no_layer_takes_in(apart):
    batches = [images(2), images(3) * 2]
    expected = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    qkernels.reestimate_bn(apart, batches)
    torch.testing.assert_close(apart.first.running_mean, expected)
    converted = qkernels.convert(apart)
    kinds = {name: type(m) for name, m in converted.named_modules()}
    assert kinds["sync"] is nn.SyncBatchNorm
    assert not any(issubclass(kind, Freezable) for kind in kinds.values())


def test_a_norm_that_is_part_of_a_layer_does_not_become_a_synchronized_one():
    qat = qkernels.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), images())
    with pytest.raises(InvalidState, match=r"0\.weight: .*call convert_sync_batchnorm on the float model"):
        nn.SyncBatchNorm.convert_sync_batchnorm(qat)
    qat(images()).sum().backward()


# --- what is random in training --------------------------------------------------------------------------------------


class Calls(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(6, 8), nn.Linear(8, 8), drop

    def forward(self, x):
        return self.last(self.drop(self.first(x).unsqueeze(-1), self.training).squeeze(-1))


CALLS = {
    "F.dropout2d": lambda x, training: F.dropout2d(x, 0.5, training),
    "F.alpha_dropout": lambda x, training: F.alpha_dropout(x, 0.5, training=training),
    "F.feature_alpha_dropout": lambda x, training: F.feature_alpha_dropout(x, 0.5, training),
    "F.rrelu": lambda x, training: F.rrelu(x, 0.1, 0.9, training=training),
    "torch.dropout": lambda x, training: torch.dropout(x, 0.5, training),
    "torch.dropout train=": lambda x, training: torch.dropout(x, p=0.5, train=training),
    "torch.alpha_dropout": lambda x, training: torch.alpha_dropout(x, 0.5, train=training),
    "torch.feature_dropout": lambda x, training: torch.feature_dropout(x, 0.5, training),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("error:prepare_qat")
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_a_call_that_is_random_in_training_stays_random(name):
    torch.manual_seed(0)
    model = Calls(CALLS[name])
    qat = qkernels.prepare_qat(model, rows())
    qat(rows())
    qkernels.disable_observer(qat)
    assert not torch.equal(qat(rows()), qat(rows()))
    qat.eval()
    assert torch.equal(qat(rows()), qat(rows()))
    assert qkernels.verify(qat, qkernels.convert(qat), [rows()]).total_mismatches == 0


def test_a_call_that_is_left_out_of_training_is_named():
    with pytest.warns(UserWarning, match="rrelu was captured with training=False"):
        qkernels.prepare_qat(Calls(lambda x, training: torch.rrelu(x, training=training)), rows())


# --- weights by a formula, and dtypes --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "formula",
    [nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal],
)
def test_a_frozen_weight_by_a_formula_stays_frozen_and_training_it_warns(formula):
    frozen, trained = formula(nn.Linear(6, 6)), formula(nn.Linear(6, 6))
    frozen.requires_grad_(False)
    with pytest.warns(UserWarning, match="parametrizations are computed once"):
        qat = qkernels.prepare_qat(nn.Sequential(frozen, trained), rows())
    assert not qat.get_parameter("0.weight").requires_grad
    assert qat.get_parameter("1.weight").requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_refused_by_the_name_of_the_module(dtype):
    qat = qkernels.prepare_qat(network(), rows())
    with pytest.raises(InvalidType, match=r"the quantizer of input .* under torch\.autocast"):
        qat.to(dtype)
    qat.to("cpu", torch.float32)(rows()).sum().backward()


# --- clamps beside zero ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [nn.Hardtanh(0.25, 1.0), nn.Hardtanh(-1.0, -0.25)])
@pytest.mark.parametrize("forward", ["int8", "float"])
def test_a_clamp_that_leaves_zero_out_trains_and_passes_gradients_inside_it_alone(clamp, forward):
    torch.manual_seed(0)
    qat = qkernels.prepare_qat(nn.Sequential(nn.Linear(6, 8), clamp, nn.Linear(8, 2)), rows(), forward=forward)
    for step in range(3):
        qat(rows(step)).square().mean().backward()
    qat.zero_grad()
    hidden = F.linear(rows(), qat.get_parameter("0.weight"), qat.get_parameter("0.bias"))
    inside = ((hidden > clamp.min_val + 0.02) & (hidden < clamp.max_val - 0.02)).any(0)
    outside = ((hidden < clamp.min_val - 0.02) | (hidden > clamp.max_val + 0.02)).all(0)
    qkernels.disable_observer(qat)
    qat(rows()).sum().backward()
    grad = qat.get_parameter("0.bias").grad
    assert inside.any()
    assert (grad[inside] != 0).all()
    assert (grad[outside] == 0).all()
    converted = qkernels.convert(qat.eval())
    assert torch.equal(qkernels.exact(qat)(rows()), converted(rows()))
