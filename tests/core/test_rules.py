"""Training rules: grids, gradients and starting values, against the papers' formulas written in plain torch."""

import math

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.prepare import quantizers
from qkernels.core.qspec import MIN_SCALE, QSpec
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import Recipe, TensorRecipe, make_recipe
from qkernels.core.rules import RULES, make_rule
from qkernels.errors import InvalidArgument


def quantizer(rule: str, spec: QSpec, channels: int | None = None, is_weight: bool = False, **options) -> Quantizer:
    recipe = TensorRecipe(spec, "minmax", rule=rule, rule_options=tuple(options.items()))
    made = Quantizer(recipe, "layer", channels, trained=True, is_weight=is_weight)
    made.state = State.TRAIN
    return made


def values(shape=(4, 6), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def parameter(q: Quantizer, name: str) -> nn.Parameter:
    return dict(q.rule.named_parameters())[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weight_lies_on_its_grid(rule, bits, per_channel):
    q = quantizer(rule, QSpec.weight(bits, per_channel), 4, is_weight=True)
    y = q(values()).detach()
    grid = q.qparams()
    assert torch.equal(grid.dequantize(grid.quantize(y)), y)
    assert torch.equal(q.eval()(values()), y)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("positive", [False, True])
def test_an_activation_lies_on_its_grid(rule, positive):
    q = quantizer(rule, QSpec.activation(4))
    x = values().detach().relu() if positive else values()
    y = q(x).detach()
    grid = q.qparams()
    assert torch.equal(grid.dequantize(grid.quantize(y)), y)
    assert torch.equal(q.eval()(x), y)


def test_lsq_starts_as_in_the_paper_and_has_its_gradients():
    q = quantizer("lsq", QSpec.weight(3, per_channel=False), is_weight=True, init="mean")
    x = values()
    y = q(x)
    scale = 2 * x.detach().abs().mean() / math.sqrt(3)
    torch.testing.assert_close(q.qparams().scale, scale.reshape(1))
    grad = torch.randn_like(y)
    y.backward(grad)
    v = x.detach() / scale
    inside = (v.round() >= -3) & (v.round() <= 3)
    by_scale = (grad * torch.where(inside, v.round() - v, v.clamp(-3, 3))).sum() / math.sqrt(3 * x.numel())
    torch.testing.assert_close(x.grad, grad * inside)
    torch.testing.assert_close(parameter(q, "growth").grad, (by_scale / scale).reshape(1), rtol=1e-5, atol=1e-6)


def test_a_step_of_sgd_changes_the_scale_as_it_would_change_a_plain_parameter():
    q = quantizer("lsq", QSpec.weight(4, per_channel=False), is_weight=True)
    q(values()).square().sum().backward()
    scale, ratio = q.qparams().scale, parameter(q, "growth")
    by_scale = ratio.grad * scale
    torch.optim.SGD([ratio], lr=1e-4).step()
    torch.testing.assert_close(q.qparams().scale - scale, -1e-4 * by_scale, rtol=1e-2, atol=1e-7)


def test_a_large_step_upwards_is_that_of_a_plain_parameter():
    q = quantizer("lsq", QSpec.weight(4, per_channel=False), is_weight=True)
    q(values())
    growth, first = parameter(q, "growth"), q.qparams().scale
    growth.grad = -5.0 * torch.ones_like(growth) / first  # by scale: -5
    torch.optim.SGD([growth], lr=20.0 * float(first)).step()
    torch.testing.assert_close(q.qparams().scale, first + 100.0 * first)


@pytest.mark.parametrize("init", ["mean", "mse", "range"])
def test_a_weight_starts_where_it_is_told_to(init):
    options = {"rule": "lsq", "rule_options": {"init": init}}
    weight = TensorRecipe(QSpec.weight(4, False), "minmax", **options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    recipe = Recipe(TensorRecipe(QSpec.activation(), "moving_average", **options), weight)
    prepared = qkernels.prepare_qat(model, torch.randn(4, 64), recipe)
    prepared(torch.randn(4, 64))
    x, scale = model[0].weight.detach(), prepared.get_submodule("0").quantizers["weight"].qparams().scale
    if init == "mean":
        torch.testing.assert_close(scale, 2 * x.abs().mean().reshape(1) / math.sqrt(7))
    elif init == "range":
        torch.testing.assert_close(scale, x.abs().amax().reshape(1) / 7.5, rtol=0.1, atol=0)
    else:
        errors = [
            (torch.fake_quantize_per_tensor_affine(x, float(s * scale), 0, -8, 7) - x).square().sum()
            for s in (1.0, 0.8, 1.25)
        ]
        assert errors[0] < min(errors[1:])


@pytest.mark.parametrize("rule", ["lsq", "lsq_plus", "pact"])
@pytest.mark.parametrize("lr", [1e3, -1e3])
def test_no_step_makes_a_scale_zero_or_negative(rule, lr):
    q = quantizer(rule, QSpec.activation(4))
    for _ in range(3):
        q(values()).square().sum().backward()
        for p in q.parameters():
            p.data -= lr * (1 + p.grad.abs())
            p.grad = None
        scale = q.qparams().scale
        assert bool((scale >= MIN_SCALE).all())
        assert bool(torch.isfinite(scale).all())
        assert bool(torch.isfinite(q(values())).all())


def test_lsq_plus_rounds_its_zero_point_once():
    q = quantizer("lsq_plus", QSpec.activation(8))
    q(values())
    start = q.qparams().zero_point.clone()
    with torch.no_grad():
        parameter(q, "offset").fill_(2.4)
    assert torch.equal(q.qparams().zero_point, start + 2)
    y, grid = q(values()).detach(), q.qparams()
    assert torch.equal(grid.dequantize(grid.quantize(values().detach())), y)
    q(values()).square().sum().backward()
    assert parameter(q, "offset").grad is not None


@pytest.mark.parametrize(
    "spec", [QSpec.activation(b) for b in (2, 3, 4, 7, 8)] + [QSpec.weight(b, False) for b in (4, 8)]
)
def test_a_learned_range_gives_back_every_grid_to_the_last_bit(spec):
    g = torch.Generator().manual_seed(0)
    n = 50_000
    q = make_rule("range", QSpec(spec.dtype, spec.qmin, spec.qmax, spec.symmetric, per_channel=True), n)
    scale = torch.exp(torch.rand(n, generator=g) * 30 - 20)
    zero_point = torch.randint(spec.qmin, spec.qmax + 1, (n,), generator=g, dtype=torch.int32)
    if spec.symmetric:
        zero_point.fill_(spec.middle)
    q.start(None, scale, zero_point)
    got = q.grid(scale + 1, zero_point)
    assert torch.equal(got[0], scale)
    assert torch.equal(got[1], zero_point.float())


def test_the_mse_start_has_less_error_than_the_range():
    x = torch.cat([values((5000,)).detach(), torch.tensor([30.0])])
    error = {}
    for init in ("mse", "range"):
        q = quantizer("lsq", QSpec.activation(4), init=init)
        error[init] = float((q(x) - x).square().mean())
    assert error["mse"] < 0.5 * error["range"]


def test_pact_learns_its_level():
    q = quantizer("pact", QSpec.activation(4))
    x = values().detach().relu().requires_grad_()
    q(x)
    with torch.no_grad():
        parameter(q, "growth").fill_(-1.0)
    level = float(q.qparams().scale) * 15
    grad = torch.ones_like(x)
    q(x).backward(grad)
    clipped = x.detach() > level
    assert clipped.any()
    torch.testing.assert_close(parameter(q, "growth").grad, clipped.sum().float().reshape(1) / level)
    assert torch.equal(x.grad == 0, clipped)


def test_dorefa_weights_go_through_tanh():
    q = quantizer("dorefa", QSpec.weight(4, per_channel=False), is_weight=True)
    x = values()
    t = torch.tanh(x.detach())
    t = t / t.abs().max()
    torch.testing.assert_close(q(x).detach(), (t * 7).round() / 7)


def test_dorefa_gradients_are_rounded_without_bias():
    q = quantizer("dorefa", QSpec.activation(8), gradient_bits=2)
    x = torch.full((2, 3), 0.5, requires_grad=True)
    grad = torch.tensor([[1.0, 0.2, -0.3], [0.02, -0.02, 0.001]])
    total = torch.zeros_like(grad)
    torch.manual_seed(0)
    for _ in range(400):
        x.grad = None
        q(x).backward(grad)
        largest = grad.abs().amax(1, keepdim=True)
        codes = (x.grad / (2 * largest) + 0.5) * 3
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        total += x.grad
    assert (total / 400 - grad).abs().max() < 0.1


def test_bnn_takes_the_sign_and_clips_the_gradient():
    q = quantizer("bnn", QSpec.activation(8))
    x = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    y.backward(torch.ones(6))
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    w = torch.tensor([[2.0, -2.0]], requires_grad=True)
    quantizer("bnn", QSpec.weight(8, False), is_weight=True)(w).backward(torch.tensor([[1.0, 1.0]]))
    assert w.grad.tolist() == [[1.0, 0.0]]  # 2.0 goes down, -2.0 would go further down


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_network_trained_by_any_rule_converts_without_a_mismatch(rule, granularity):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4),
        nn.Hardtanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(8, 2, 8, 8)
    qat = qkernels.prepare_qat(model, x, rule=rule, bits=4, weight_granularity=granularity)
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        qat(torch.randn(8, 2, 8, 8)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in qat.parameters())
    converted = qkernels.convert(qat)
    assert qkernels.verify(qat, converted, [x, torch.randn(3, 2, 8, 8)]).total_mismatches == 0
    qat.eval()
    with torch.no_grad():  # one step of a 4 bit grid
        steps = max(float(q.qparams().scale.max()) for q in quantizers(qat) if not q.is_weight)
        assert (qat(x) - converted(x)).abs().max() <= 2 * steps


def test_rules_are_part_of_a_recipe():
    recipe = make_recipe("int8", weight_rule="dorefa", activation_rule="pact")
    assert (recipe.weight.rule, recipe.activation.rule) == ("dorefa", "pact")
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(InvalidArgument, match="unknown rule"):
        TensorRecipe(QSpec.weight(), rule="nothing")
    with pytest.raises(InvalidArgument, match="lsq"):
        TensorRecipe(QSpec.weight(), rule="lsq", rule_options=(("speed", 1),))
    with pytest.raises(InvalidArgument, match="init must be"):
        make_rule("lsq", QSpec.weight(), 1, init="max")
