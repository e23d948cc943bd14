"""What scripts do around NNI's quantizers: accumulate, schedule, freeze, prune, hook, take off and begin again."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD, lr_scheduler

import qkernels
import qkernels.frontends.nni as nni
from qkernels.core.quantizer import State
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported
from qkernels.frontends import nni_v2

ALL = ["_input_", "weight", "_output_"]
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def entry(**changed):
    return {"op_types": ["Linear"], "target_names": ALL, "quant_dtype": "int8", "quant_scheme": "affine"} | changed


def named(*names, **changed):
    found = entry(op_names=list(names), **changed)
    del found["op_types"]
    return found


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.relu = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


def made(
    model, config=None, kind="QATQuantizer", lr=0.0, schedule=None, x=X, before_step=lambda model: None, **options
):
    """A quantizer whose loop trains on one batch; what it saw at each step is `seen`."""
    optimizer = nni.trace(SGD)(model.parameters(), lr=lr)
    seen = []

    def training_func(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        model.train()
        before_step(model)
        for _ in range(max_steps):
            optimizer.zero_grad()
            y = model(x)
            y.square().mean().backward()
            optimizer.step()
            seen.append((len(y.detach().unique()), [group["lr"] for group in optimizer.param_groups]))
            if scheduler is not None:
                scheduler.step()

    scheduler = None if schedule is None else schedule(optimizer)
    evaluator = nni.TorchEvaluator(
        training_func, optimizer, lambda *_: None, scheduler, evaluating_func=lambda model: model.eval()(x)
    )
    quantizer = getattr(nni, kind)(model, config or [entry()], evaluator, **options)
    return quantizer, seen


# ---- steps of the optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("network", [lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Reused])
def test_rounding_begins_after_steps_of_the_optimizer_however_often_a_module_is_called(network, batches):
    """At step 4 in NNI 3.0, in 2.x one before: its count begins at 1."""

    def first_rounded(model, optimizer):
        for step in range(8):
            for _ in range(batches):
                y = model.train()(X)
            if len(y.detach().unique()) <= 4:
                return step
            optimizer.step()

    torch.manual_seed(0)
    model, found = network(), []
    assert len(model(X).unique()) > 16

    def training_func(model, optimizer, *_):
        found.append(first_rounded(model, optimizer))

    optimizer = SGD(model.parameters(), lr=0.0)
    evaluator = nni.TorchEvaluator(training_func, optimizer, lambda *_: None)
    config = [entry(op_types=["ReLU"], target_names=["_output_"], quant_dtype="int2")]
    nni.QATQuantizer(model, config, evaluator, quant_start_step=4).compress(8)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    config = [{"quant_types": ["output"], "quant_bits": 2, "op_types": ["ReLU"], "quant_start_step": 4}]
    nni_v2.QAT_Quantizer(model, config, optimizer, X).compress()
    assert [*found, first_rounded(model, optimizer)] == [4, 3]


def test_a_negative_start_is_none():
    model = network()
    quantizer, _ = made(model, quant_start_step=-1)
    quantizer.compress(1)
    assert all(q.rounds for _, _, q in quantizer.attached)


SCHEDULES = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("api", ["3.0", "2.x"])
def test_learned_scales_follow_a_scheduler_that_was_there_before(api, schedule):
    model = network()
    if api == "3.0":
        quantizer, _ = made(model, kind="LsqQuantizer", lr=0.1, schedule=SCHEDULES[schedule])
        quantizer.compress(3)
        optimizer = quantizer.evaluator.optimizers[0]
    else:
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = SCHEDULES[schedule](optimizer)
        config = [{"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Linear"]}]
        quantizer = nni_v2.LsqQuantizer(model, config, optimizer)
        quantizer.compress()
        for _ in range(3):
            model(X).sum().backward()
            optimizer.step()
            scheduler.step()
    assert len(optimizer.param_groups) == 1
    learned = {p for _, _, q in quantizer.attached for p in q.parameters()}
    assert learned <= set(optimizer.param_groups[0]["params"])


def test_a_learned_scale_joins_the_group_of_its_layer_in_whichever_optimizer_has_it():
    model = network()
    slow, fast = SGD(model[0].parameters(), lr=0.0), SGD([{"params": model[2].parameters(), "lr": 0.1}], lr=0.0)

    def training_func(model, optimizers, *_):
        model(X).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    evaluator = nni.TorchEvaluator(training_func, [slow, fast], lambda *_: None)
    quantizer = nni.LsqQuantizer(model, [entry(target_names=["weight"], quant_scheme="symmetric")], evaluator)
    _, calibration = quantizer.compress(1)
    assert calibration["0"]["weight"]["scale"].item() == pytest.approx(0.01)
    assert calibration["2"]["weight"]["scale"].item() != pytest.approx(0.01)
    quantizer.compress(1)  # nothing joins twice
    assert [len(o.param_groups[0]["params"]) for o in (slow, fast)] == [3, 3]


def test_the_scale_of_a_fused_activation_joins_the_group_of_its_layer():
    model = Normalized()
    optimizer = SGD([{"params": model.norm.parameters(), "lr": 0.5}, {"params": model.conv.parameters()}], lr=0.1)
    evaluator = nni.TorchEvaluator(lambda *_: None, optimizer, lambda *_: None)
    config = [named("conv", target_names=["_output_"], quant_scheme="symmetric", fuse_names=[("conv", "relu")])]
    quantizer = nni.LsqQuantizer(model, config, evaluator)
    quantizer.track_forward(torch.randn(4, 1, 8, 8))
    quantizer.compress(1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]


def test_each_compress_starts_optimizer_and_scheduler_anew():
    """As they were made: what happened to a traced one before the evaluator is undone too."""
    model = network()
    optimizer = nni.trace(SGD)(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = nni.trace(lr_scheduler.StepLR)(optimizer, 1, 0.1)
    seen = []

    def training_func(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        assert not optimizer.state
        for _ in range(max_steps):
            optimizer.zero_grad()
            (1e-3 * model(X).sum()).backward()
            optimizer.step()
            seen.append(optimizer.param_groups[0]["lr"])
            scheduler.step()

    training_func(model, optimizer, None, scheduler, 2, None)
    evaluator = nni.TorchEvaluator(training_func, optimizer, lambda *_: None, scheduler)
    quantizer = nni.LsqQuantizer(model, [entry(quant_scheme="symmetric")], evaluator)
    quantizer.compress(2)
    quantizer.compress(2)
    assert seen == pytest.approx([0.1, 0.01] * 3)
    assert type(optimizer) is SGD


def test_a_scheduler_that_begins_below_the_rate_begins_there_again():
    quantizer, seen = made(network(), lr=0.1, schedule=SCHEDULES["LinearLR"])
    quantizer.compress(2)
    quantizer.compress(2)
    assert [rates for _, rates in seen] == [[pytest.approx(0.01)], [pytest.approx(0.028)]] * 2


def test_signs_limit_biases_too_and_nothing_once_they_are_taken_off():
    model = network()
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    quantizer, _ = made(model, [entry(target_names=["weight", "bias"])], "BNNQuantizer")
    quantizer.compress(1)
    assert model[0].bias.abs().max() <= 1.0
    quantizer.unwrap_model()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    quantizer.evaluator.optimizers[0].step()
    assert model[0].weight.max() == 3.0


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_an_encoder_layer_computes_with_rounded_weights_in_torchs_fast_path_too():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    quantizer, _ = made(model, [entry(target_names=["weight"], quant_dtype="int2")], x=x)
    quantizer.compress(1)
    slow = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
    quantizer.unwrap_model()
    assert not model.linear1._forward_pre_hooks
    with torch.no_grad():
        assert (model(x) - slow).abs().max() > 0.1


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
    ],
)
def test_a_weight_that_is_computed_is_refused_and_inputs_beside_it_are_not(compute):
    def network():
        return nn.Sequential(compute(nn.Linear(4, 4)))

    for targets in (ALL, None):
        with pytest.raises(Unsupported, match=r"0\.weight: is computed and no Parameter; make it one"):
            made(network(), [named("0", target_names=targets)])
    model = network()
    with pytest.raises(Unsupported, match=r"0\.weight: is computed and no Parameter"):
        nni_v2.QAT_Quantizer(model, [{"quant_types": ["weight"], "op_names": ["0"]}], SGD(model.parameters(), lr=0.1))
    model = network()
    quantizer, _ = made(model, [named("0", target_names=["_input_", "_output_"])])
    _, calibration = quantizer.compress(1)
    assert set(calibration["0"]) == {"_input_0", "_output_0"}


def test_a_refused_site_leaves_the_model_as_it_was():
    model = Normalized()
    config = [named("conv", fuse_names=[("conv", "norm")])]
    with pytest.raises(Unsupported):
        made(nn.Sequential(model, nn.utils.spectral_norm(nn.Linear(4, 4))), [named("0.conv", "1")])
    model.norm.running_mean = None
    with pytest.raises(InvalidArgument, match="no batch normalization with running statistics"):
        made(model, config)
    assert (type(model.conv), type(model.norm)) == (nn.Conv2d, nn.BatchNorm2d)


FREEZING = {
    "by name": lambda model: model.norm.eval(),
    "by class": lambda model: [m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
}


@pytest.mark.parametrize("freeze", [*FREEZING, None])
@pytest.mark.parametrize("api", ["3.0", "2.x"])
def test_a_folded_norm_that_the_loop_freezes_keeps_its_statistics(api, freeze):
    model, x = Normalized(), torch.randn(4, 1, 8, 8)
    freeze = FREEZING.get(freeze, lambda model: None)
    if api == "3.0":
        quantizer, _ = made(model, [named("conv", fuse_names=[("conv", "norm")])], x=x, before_step=freeze)
        quantizer.compress(2)
        quantizer.unwrap_model()
    else:
        optimizer = SGD(model.parameters(), lr=0.0)
        quantizer = nni_v2.QAT_Quantizer(model, [{"quant_types": ["weight"], "op_types": ["Conv2d"]}], optimizer, x)
        quantizer.compress()
        freeze(model.train())
        model(x)
        quantizer._attached.restore()
    assert bool(model.norm.running_mean.any()) == (freeze not in FREEZING.values())


def test_a_folded_norm_has_its_tensors_under_its_own_name():
    model = Normalized()
    float_names = set(model.state_dict())
    parameters = list(model.norm.parameters())
    quantizer, _ = made(model, [named("conv", fuse_names=[("conv", "norm")])], x=torch.randn(4, 1, 8, 8))
    quantizer.compress(1)
    assert float_names <= set(model.state_dict())
    assert all(a is b for a, b in zip(parameters, model.norm.parameters(), strict=True))
    assert torch.equal(copy.deepcopy(model).eval()(torch.ones(1, 1, 8, 8)), model.eval()(torch.ones(1, 1, 8, 8)))
    converted = quantizer.convert(torch.randn(4, 1, 8, 8))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())


@pytest.mark.parametrize("group", [("conv", "norm"), ("conv", "norm", "relu")])
def test_a_norm_behind_a_layer_whose_weight_is_not_rounded_stays_and_the_output_is_rounded_behind_it(group):
    model, x = Normalized(), torch.randn(4, 1, 8, 8)
    config = [named("conv", target_names=["_output_"], quant_dtype="int4", fuse_names=[group])]
    quantizer, _ = made(model, config, x=x)
    _, calibration = quantizer.compress(2)
    assert list(calibration) == ["conv"]
    last = model.eval().norm(model.conv(x))
    assert (len(last.unique()) <= 15) == (group[-1] == "norm")
    assert len(model(x).unique()) <= 15
    assert model.norm.running_mean.any()
    torch.testing.assert_close(quantizer.convert(x)(x), model(x))


class ByKeyword(nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.relu, self.by_keyword = nn.Linear(4, 4), nn.ReLU(), by_keyword

    def forward(self, x):
        return self.relu(input=self.fc(input=x)) if self.by_keyword else self.relu(self.fc(x))


def test_a_call_by_keyword_is_a_call():
    results = []
    for by_keyword in (False, True):
        quantizer, _ = made(ByKeyword(by_keyword), [entry(), named("relu", target_names=["_input_"])])
        model, _ = quantizer.compress(2)
        results += [model.eval()(X), quantizer.convert(X)(X)]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_a_maximum_that_comes_with_its_indices_is_rounded_and_not_converted():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x):
            return self.pool(self.conv(x))[0]

    model, x = Network(), torch.randn(4, 1, 8, 8)
    quantizer, _ = made(model, [named("pool", target_names=["_output_"], quant_dtype="int2")], x=x)
    quantizer.compress(1)
    assert len(model(x).unique()) <= 3
    with pytest.raises(Unsupported, match="convert: pool: there are no integers"):
        quantizer.convert(x)


def test_a_second_name_of_a_module_means_the_module():
    layer = nn.Linear(4, 4)
    model = nn.Module()
    model.first = model.second = layer
    model.forward = lambda x: layer(x)
    quantizer, _ = made(model, [named("second")])
    assert list(quantizer.compress(1)[1]) == ["first"]
    assert quantizer.recipe.weight.spec.qmax == 127
    assert not quantizer.recipe.overrides
    quantizer.unwrap_model()
    model = nn.Sequential(layer, layer)
    made(model, [entry(op_types=["Linear"])])[0].compress(1)


def test_weights_of_another_precision_than_float32_are_refused():
    with pytest.raises(InvalidType, match=r"0\.weight: must be float32, got torch.float64; quantize model.float\(\)"):
        made(network().double())


# ---- several quantizers, and none ------------------------------------------------------------------------------------


def test_two_quantizers_share_a_model_but_no_layer():
    model = network()
    first, _ = made(model, [named("0")])
    second, _ = made(model, [named("2", quant_dtype="int4")], "LsqQuantizer")
    assert list(first.compress(2)[1]) == ["0"]
    assert list(second.compress(2)[1]) == ["2"]
    converted = first.convert(X)
    assert qkernels.verify(first.prepared(X), converted, [X]).total_mismatches == 0
    torch.testing.assert_close(converted(X), model.eval()(X))
    with pytest.raises(InvalidState, match="0: has quantizers already"):
        made(model, [named("0")])
    calibrated, _ = made(network(), [named("0")], "PtqQuantizer")
    trained, _ = made(calibrated.bound_model, [named("2")])
    trained.track_forward(X)
    calibrated.compress()
    assert {q.state for _, _, q in trained.attached} == {State.TRAIN}


def test_what_is_taken_off_trains_and_exports_no_more(tmp_path):
    quantizer, _ = made(network())
    _, calibration = quantizer.compress(2)
    assert quantizer.unwrap_model() is quantizer.unwrap_model()
    again = quantizer.get_calibration_config()
    assert all(torch.equal(again[p][t]["scale"], e["scale"]) for p, ts in calibration.items() for t, e in ts.items())
    for call in (lambda: quantizer.compress(1), lambda: quantizer.track_forward(X), quantizer.convert):
        with pytest.raises(InvalidState, match=r"QATQuantizer: the quantizers were taken off \(export_model, unwrap"):
            call()
    never, _ = made(network())
    never.unwrap_model()
    assert all(e["scale"] is None for ts in never.get_calibration_config().values() for e in ts.values())
    model = network()
    old = nni_v2.QAT_Quantizer(model, [{"op_types": ["Linear"]}], SGD(model.parameters(), lr=0.1))
    old.compress()
    model(X)
    exported = old.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
    with pytest.raises(InvalidState, match="taken off"):
        old.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
    assert torch.load(tmp_path / "calibration.pth") == exported


def test_hooks_attributes_and_tensors_that_came_while_it_was_wrapped_stay():
    model, calls = network(), []
    early = model[0].register_forward_hook(lambda *_: calls.append("early"))
    quantizer, _ = made(model)
    late = model[0].register_forward_pre_hook(lambda *_: calls.append("late"))
    early.remove()
    model[0].tag = 5
    model[2].weight = nn.Parameter(torch.full((4, 8), 0.5))
    model(X)
    quantizer.unwrap_model()
    assert calls == ["late"]
    model(X)
    assert calls == ["late"] * 2
    late.remove()
    model(X)
    assert calls == ["late"] * 2
    assert (model[0].tag, model[2].weight[0, 0].item()) == (5, 0.5)
    assert not hasattr(model[0], "quantizers")


def test_a_calibration_config_that_went_in_stays_whatever_data_comes():
    quantizer, _ = made(network())
    _, calibration = quantizer.compress(3)
    calibration = copy.deepcopy(calibration)
    other, _ = made(network(), x=100 * X)
    other.track_forward(100 * X)
    other.update_calibration_config(calibration)
    _, again = other.compress(3)
    for path, targets in calibration.items():
        for target, wanted in targets.items():
            assert torch.equal(again[path][target]["scale"], wanted["scale"])
            found, step = again[path][target]["tracked_max"], float(wanted["scale"])
            torch.testing.assert_close(found, wanted["tracked_max"], rtol=0, atol=step)
    calibrated, _ = made(network(), kind="PtqQuantizer", x=100 * X)
    calibrated.update_calibration_config(calibration)
    assert torch.equal(calibrated.compress()[1]["0"]["_input_0"]["scale"], calibration["0"]["_input_0"]["scale"])


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(InvalidArgument, match="compress: max_steps or max_epochs must be a number, both are None"):
        made(network())[0].compress(None, None)
    with pytest.raises(InvalidArgument, match=r"quant_start_step must be a whole number, got 2\.0"):
        made(network(), quant_start_step=2.0)
    with pytest.raises(InvalidType, match="lr_schedulers must be torch schedulers or None, got 'nonsense'"):
        made(network(), schedule=lambda optimizer: "nonsense")
    with pytest.raises(Unsupported, match="DoReFaQuantizer: 0: gradients have at most 16 bits"):
        made(network(), [entry(target_names=["weight"], quant_dtype="int20")], "DoReFaQuantizer")


def test_weights_of_dorefa_with_a_grid_a_channel_go_back_in():
    rows = {"weight": {"quant_dtype": "int4", "granularity": "out_channel"}}
    quantizer, _ = made(network(), [entry(target_names=["weight"], target_settings=rows)], "DoReFaQuantizer")
    model, calibration = quantizer.compress(1)
    again, _ = made(network(), [entry(target_names=["weight"], target_settings=rows)], "DoReFaQuantizer")
    again.update_calibration_config(calibration)
    assert torch.equal(again.bound_model.eval()(X), model.eval()(X))


def test_a_scheme_that_was_not_named_is_none_in_the_calibration_config():
    quantizer, _ = made(network(), [entry(quant_scheme=None)])
    _, calibration = quantizer.compress(1)
    assert {e["quant_scheme"] for targets in calibration.values() for e in targets.values()} == {None}
    quantizer.update_calibration_config(calibration)


def test_scheme_and_dtype_of_2_change_one_at_a_time():
    try:
        nni_v2.set_quant_scheme_dtype("weight", new_scheme="per_channel_symmetric")
        nni_v2.set_quant_scheme_dtype("weight", new_dtype="int")
        model = network()
        nni_v2.QAT_Quantizer(model, [{"op_types": ["Linear"]}], SGD(model.parameters(), lr=0.1))
        spec = model[0].quantizers["weight"].spec
        assert (spec.per_channel, spec.symmetric, spec.qmin) == (True, True, -127)
    finally:
        nni_v2.set_quant_scheme_dtype("weight", "per_tensor_affine", "uint")


def test_a_model_of_2_without_a_graph_is_trained_without_folding_and_in_its_own_modes():
    class Branching(Normalized):
        def forward(self, x):
            y = super().forward(x)
            return 2 * y if y.sum() > 0 else y

    for network, warned in ((Branching, True), (Normalized, False)):
        model = network().train()
        model.relu.eval()
        config = [{"quant_types": ["weight"], "op_types": ["Conv2d"]}]
        with pytest.warns(UserWarning, match="no batch norm is folded") if warned else nullcontext():
            nni_v2.QAT_Quantizer(model, config, SGD(model.parameters(), lr=0.1), torch.randn(2, 1, 8, 8))
        assert (model.training, model.conv.training, model.relu.training) == (True, True, False)
        assert (model.conv.norm is None) == warned
