"""AIMET scripts that change quantizers, modes, files and configurations; against AIMET itself where it is installed."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from aimet_networks import images, prepared_model
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported
from qkernels.frontends.aimet import model_preparer, quantsim
from qkernels.frontends.aimet.adaround_weight import Adaround, AdaroundParameters
from qkernels.frontends.aimet.batch_norm_fold import fold_all_batch_norms, fold_all_batch_norms_to_scale
from qkernels.frontends.aimet.quantization.affine import QuantizeDequantize

pytestmark = pytest.mark.filterwarnings("ignore")
X = images()


@pytest.fixture(scope="module")
def original():
    found = pytest.importorskip("aimet_torch", reason="needs aimet-torch and torchvision", exc_type=ImportError)
    from aimet_torch import batch_norm_fold, model_preparer, quantsim  # noqa: F401
    from aimet_torch.quantization import affine  # noqa: F401

    return found


def network(training=False):
    """Convolutions with and without a batch norm behind, dropout, two grids that are one after a concatenation."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Sigmoid(), nn.Dropout()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(3 * 24 * 24, 5)).train(training)


def simulation(api=aimet, model=None, calibrated=True, **options):
    sim = api.quantsim.QuantizationSimModel(model or network(), dummy_input=X, **options)
    if calibrated:
        sim.compute_encodings(lambda model: model(X))
    return sim


class Joined(nn.Module):
    """Outputs that are on one grid, because they are concatenated."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


def plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


def encodings(sim):
    return copy.deepcopy(sim.module_encodings())


# ---- quantizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tf_enhanced", "percentile", "min_max"])
def test_folding_into_scales_keeps_what_is_simulated_under_every_scheme(scheme):
    model = network()
    model[1].running_var.fill_(0.04)
    sim = simulation(model=model, quant_scheme=scheme, default_param_bw=4)
    with torch.no_grad():
        before = sim.model(X)
        fold_all_batch_norms_to_scale(sim)
        torch.testing.assert_close(sim.model(X), before, rtol=0, atol=1e-5)


def test_least_squares_search_takes_weights_of_one_number_a_channel():
    sim = simulation(
        model=nn.Sequential(nn.Conv2d(1, 1, 1), nn.PReLU(), nn.Conv2d(1, 3, 1)), quant_scheme="tf_enhanced"
    )
    weight = sim.model[2].param_quantizers["weight"]
    torch.testing.assert_close(plain(weight(sim.model[2].weight)), sim.model[2].weight.detach())
    weight.set_range(-1.0, 1.0)
    torch.testing.assert_close(weight.get_scale().flatten(), torch.full((3,), 2 / 255))


RANGES = {
    "symmetric": ((), 4, True, -1.03, 2.1),
    "affine": ((), 4, False, -1.03, 2.1),
    "without zero": ((), 8, False, 0.5, 2.1),
    "channels": ((4, 1), 4, True, -torch.arange(1.0, 5.0).reshape(4, 1), torch.arange(1.0, 5.0).reshape(4, 1)),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_that_is_set_gives_aimets_grid(original, name):
    shape, bits, symmetric, low, high = RANGES[name]
    both = [
        api(shape, bits, symmetric) for api in (QuantizeDequantize, original.quantization.affine.QuantizeDequantize)
    ]
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for change in (None, {"bitwidth": 6}, {"symmetric": not symmetric}):
        for quantizer in both:
            if change is None:
                quantizer.set_range(low, high)
            for key, value in (change or {}).items():
                setattr(quantizer, key, value)
        mine, theirs = (
            [plain(q(x)), *(plain(get()) for get in (q.get_min, q.get_max, q.get_scale, q.get_offset))] for q in both
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert (both[0].qmin, both[0].qmax, both[0].signed) == (both[1].qmin, both[1].qmax, both[1].signed)


def test_a_symmetric_range_is_divided_into_all_steps():
    quantizer = QuantizeDequantize((), bitwidth=4, symmetric=True)
    quantizer.set_range(-1, 1)
    assert quantizer.get_scale().item() == pytest.approx(2 / 15)
    assert quantizer.get_offset().item() == 0
    assert quantizer.get_max().item() == pytest.approx(7 * 2 / 15)
    quantizer.set_range(None, 2.0)
    assert quantizer.get_scale().item() == pytest.approx(3 / 15)
    with pytest.raises(InvalidArgument, match="set_range: needs low <= high, one or 1 of each"):
        quantizer.set_range(1.0, -1.0)
    with pytest.raises(InvalidArgument, match="set_range"):
        quantizer.set_range(torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize("x", [torch.randn(4, 8), torch.randn(8, 8), torch.randn(2, 3, 8), torch.randn(8)])
def test_shapes_stand_against_the_last_dimensions(x):
    numbers = []
    for shape in ((8,), (1,) * (x.dim() - 1) + (8,)):
        quantizer = QuantizeDequantize(shape, bitwidth=4, symmetric=True)
        with quantizer.compute_encodings():
            quantizer(x)
        numbers.append(quantizer(x))
    torch.testing.assert_close(*numbers)
    assert quantizer.get_max().shape == shape


def test_arguments_come_in_the_order_of_aimet():
    by_codes, by_bits = QuantizeDequantize((1,), -8, 7, True), QuantizeDequantize(1, 4, True, None, block_size=None)
    assert (
        (by_codes.bitwidth, by_codes.symmetric, by_codes.qmin)
        == (by_bits.bitwidth, True, by_bits.qmin)
        == (4, True, -8)
    )
    with pytest.raises(Unsupported, match="encoding_analyzer has no counterpart"):
        QuantizeDequantize((1,), 4, False, object())


def test_float64_is_refused_by_type():
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    with pytest.raises(InvalidType, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        quantizer(torch.zeros(2, dtype=torch.float64))


def test_kinds_change_under_the_same_parameters():
    """So that an optimizer made before goes on training them."""
    sim = simulation()
    quantizer = sim.model[2].output_quantizers[0]
    ends = quantizer.min, quantizer.max
    quantizer.requires_grad_(False)
    quantizer.bitwidth, quantizer.symmetric = 4, True
    sim.load_encodings(simulation().module_encodings())
    assert quantizer is sim.model[2].output_quantizers[0]
    assert (quantizer.min, quantizer.max) == ends
    assert not quantizer.max.requires_grad
    assert (quantizer.bitwidth, quantizer.symmetric) == (8, False)
    quantizer.freeze()
    quantizer.bitwidth, high = 4, quantizer.get_max().item()
    with aimet.nn.compute_encodings(sim.model):
        sim.model(3 * X)
    assert quantizer.get_max().item() == high


# ---- encodings files -------------------------------------------------------------------------------------------------


def test_tied_grids_stay_tied_when_a_file_is_read():
    model = model_preparer.prepare_model(Joined().eval())
    first, second = (simulation(model=model) for _ in range(2))
    second.load_encodings(first.module_encodings())
    parts = second.model.a, second.model.b, second.model.module_cat
    assert len({part.output_quantizers[0] for part in parts}) == 1
    second.compute_encodings(lambda model: model(X * torch.tensor(3.0)))
    assert qkernels.verify(second.prepared(), second.convert(), [3 * X]).total_mismatches == 0


def test_a_file_puts_no_quantizer_where_there_is_none(tmp_path):
    content, sim = encodings(simulation()), simulation(calibrated=False)
    sim.model[2].output_quantizers[0] = sim.model[3].param_quantizers["weight"] = None
    (tmp_path / "net.encodings").write_text(json.dumps(content))
    with pytest.raises(InvalidState, match=r"param_encodings\.3\.weight: no quantizer present"):
        sim.set_and_freeze_param_encodings(tmp_path / "net.encodings")
    with pytest.raises(RuntimeError, match=r"2\.output\.0: no quantizer present"):
        sim.load_and_freeze_encodings({"activation_encodings": content["activation_encodings"]})
    sim.load_encodings(content, strict=False)
    sim.load_and_freeze_encodings(tmp_path / "net.encodings", ignore_when_quantizer_disabled=True)
    assert sim.model[2].output_quantizers[0] is sim.model[3].param_quantizers["weight"] is None
    assert not sim.model[7].output_quantizers[0].is_overwrite_allowed()


def test_a_file_leaves_frozen_quantizers_alone_and_flags_that_it_does_not_name():
    content, sim = encodings(simulation()), simulation()
    wider = copy.deepcopy(content)
    for sides in wider["activation_encodings"].values():
        for row in (row for rows in sides.values() for row in rows.values()):
            row |= {key: 2 * row[key] for key in ("scale", "min", "max")}
    sim.load_encodings(content, allow_overwrite=False)
    sim.model[7].output_quantizers[0].allow_overwrite(True)
    sim.load_encodings(wider, allow_overwrite=None, partial=False)
    found = sim.module_encodings()["activation_encodings"]
    assert found["2"] == content["activation_encodings"]["2"]
    assert found["7"] == wider["activation_encodings"]["7"]
    assert sim.model[2].output_quantizers[0].max.requires_grad  # frozen to calibration, not to training
    assert sim.model[7].output_quantizers[0].is_overwrite_allowed()
    sim.model(X).square().sum().backward()
    assert sim.model[2].output_quantizers[0].max.grad is not None


def test_a_file_without_encodings_is_an_error():
    with pytest.raises(InvalidArgument, match="there is no encoding"):
        simulation().load_encodings({"activation_encodings": {}, "param_encodings": {}})


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_modules_keep_their_modes():
    model = network(training=True)
    model[1].eval()
    model[5].eval()
    prepared, sim = (
        model_preparer.prepare_model(copy.deepcopy(model)),
        quantsim.QuantizationSimModel(model, dummy_input=X),
    )
    for network_of in (model, sim.model, prepared):
        assert [child.training for child in network_of.children()] == [i not in (1, 5) for i in range(8)]
    sim.compute_encodings(lambda model: model(X))
    with pytest.raises(ZeroDivisionError):
        sim.compute_encodings(lambda model: 1 / 0)
    fold_all_batch_norms(model, dummy_input=X)
    assert [child.training for child in sim.model.children()] == [i not in (1, 5) for i in range(8)]
    assert sim.model.training
    assert [child.training for child in model.children()] == [i != 5 for i in range(8)]


# ---- prepare_model ---------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Conv2d(1, 4, 3), change

    def forward(self, x):
        y = self.layer(x)
        self.change(y)
        return y * 2


def through_a_view(y):
    y.flatten(1).add_(1.0)


def behind_a_view(y):
    view = y.flatten(1)
    y.mul_(3.0)
    y.add_(view.reshape(y.shape))


CHANGES = {
    "add_": lambda y: y.add_(1.0),
    "mul_": lambda y: y.mul_(y.sigmoid()),
    "relu_": lambda y: y.relu_(),
    "F.relu_": lambda y: F.relu_(y),
    "through a view": through_a_view,
    "behind a view": behind_a_view,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_in_place_is_read_afterwards(name):
    torch.manual_seed(0)
    model = InPlace(CHANGES[name]).eval()
    with torch.no_grad():
        expected = model(X)
        prepared = model_preparer.prepare_model(copy.deepcopy(model))
        assert torch.equal(prepared(X), expected)
        if "view" not in name:
            sim = simulation(model=prepared)
            torch.testing.assert_close(sim.convert()(X), expected, rtol=0, atol=0.05)
            assert len([m for _, m in sim.named_qmodules()]) == 4 - (name != "mul_")


def test_operands_may_be_named():
    class Named(nn.Module):
        def forward(self, x):
            return torch.mul(input=torch.add(x, other=x), other=torch.pow(input=x, exponent=2))

    prepared = model_preparer.prepare_model(Named())
    assert torch.equal(prepared(X), (X + X) * X**2)
    assert len(simulation(model=prepared).model.module_mul.input_quantizers) == 2


# ---- configurations --------------------------------------------------------------------------------------------------

CONFIG = {
    "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True", "is_symmetric": "True"}},
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {},
    "supergroups": [],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def kinds(sim):
    return {name: (q.bitwidth, q.symmetric) for name, q in sim.named_quantizers()}


OP_TYPES = {
    "symmetric inputs": {"Gemm": {"is_symmetric": "True"}, "Sigmoid": {"is_symmetric": "True"}},
    "constraints": {
        "Sigmoid": {"encoding_constraints": {"min": 0.0, "max": 1.0}},
        "Relu": {"encoding_constraints": {"min": 0.0}},
    },
}


@pytest.mark.parametrize("name", OP_TYPES)
def test_what_is_said_for_a_type_gives_aimets_grids(original, tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"op_type": OP_TYPES[name]}))
    mine, theirs = (simulation(api, config_file=str(path)) for api in (aimet, original))
    assert kinds(mine) == kinds(theirs)
    torch.testing.assert_close(plain(mine.model(X)), plain(theirs.model(X)), rtol=0, atol=1e-4)


def test_symmetry_of_a_type_holds_for_the_producers_of_its_inputs():
    config = CONFIG | {"op_type": {"Sigmoid": {"is_symmetric": "True"}}}
    sim = simulation(config_file=config)
    symmetric = [name for name, q in sim.named_quantizers() if q.symmetric and "weight" not in name]
    assert symmetric == ["3.output_quantizers.0", "4.output_quantizers.0"]
    assert sim.model[3].output_quantizers[0].get_offset() == 0


def test_constraints_fix_the_range_of_an_output():
    sim = simulation(config_file=CONFIG | {"op_type": OP_TYPES["constraints"]}, quant_scheme="tf_enhanced")
    sigmoid, relu = sim.model[4].output_quantizers[0], sim.model[2].output_quantizers[0]
    assert (sigmoid.get_min(), sigmoid.get_max()) == (0, 1)
    assert [end.requires_grad for end in (sigmoid.min, sigmoid.max, relu.min, relu.max)] == [False] * 3 + [True]
    with pytest.raises(Unsupported, match=r"config\.op_type\.Tanh\.encoding_constraints: needs numbers min < max"):
        simulation(config_file=CONFIG | {"op_type": {"Tanh": {"encoding_constraints": {"max": 1.0}}}})


def test_configurations_of_aimet_are_read(original):
    files = sorted((Path(original.__file__).parent / "common" / "quantsim_config").glob("*.json"))
    assert len(files) > 10
    for file in files:
        simulation(config_file=file, calibrated=False)


def test_a_module_called_twice_gets_quantizers_only_where_it_has_parameters(original):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    mine, theirs = (simulation(api, model=Twice().eval()) for api in (aimet, original))
    assert kinds(mine) == kinds(theirs)
    assert mine.model.relu.output_quantizers[0] is None


def test_what_cannot_be_simulated_is_refused_at_once():
    with pytest.raises(Unsupported, match=r"Linear calls no modules.*nn\.Sequential"):
        quantsim.QuantizationSimModel(nn.Linear(3, 2), dummy_input=torch.randn(2, 3))
    with pytest.raises(InvalidState, match="has quantizers already"):
        quantsim.QuantizationSimModel(simulation().model, dummy_input=X)


# ---- other verbs -----------------------------------------------------------------------------------------------------


def test_adaround_asks_for_as_many_batches_as_there_are():
    with pytest.raises(ValueError, match="num_batches is 10, but there are 4"):
        AdaroundParameters([X] * 4, num_batches=10)


def test_adaround_writes_encodings_of_convolutions_and_linear_layers_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(26), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)).eval()
    how = {"params": AdaroundParameters([X], 1, default_num_iterations=2), "path": tmp_path, "filename_prefix": "net"}
    Adaround.apply_adaround(model, X, **how)
    assert sorted(json.loads((tmp_path / "net.encodings").read_text())["param_encodings"]) == ["0.weight", "3.weight"]
    same = Adaround.apply_adaround(model, X, **how, ignore_quant_ops_list=[model])
    assert json.loads((tmp_path / "net.encodings").read_text()) == {"param_encodings": {}}
    assert torch.equal(same[0].weight, model[0].weight)
    with pytest.raises(InvalidArgument, match=r"param_bw_override_list: Flatten.* has no weight"):
        Adaround.apply_adaround(model, X, **how, param_bw_override_list=[(model[2], 4)])


def test_layers_may_be_excluded_and_simulations_saved(tmp_path):
    sim = simulation(model=prepared_model())
    sim.exclude_layers_from_quantization([sim.model.conv2])
    assert type(sim.model.conv2) is nn.Conv2d
    assert sim.module_encodings()["excluded_layers"] == ["conv2"]
    assert len(list(sim.qmodules())) == len(list(sim.named_qmodules()))
    quantsim.save_checkpoint(sim, tmp_path / "sim.pt")
    again = quantsim.load_checkpoint(tmp_path / "sim.pt")
    assert torch.equal(again.model(X), sim.model(X))
    other = simulation(model=prepared_model(), calibrated=False)
    other.exclude_layers_from_quantization([other.model.conv2])
    other.model.load_state_dict(sim.quantizer_state_dict(), strict=False)
    assert torch.equal(other.model(X), sim.model(X))
    restored = sim.get_original_model(sim.model)
    assert torch.equal(restored.conv1.weight, sim.model.conv1.weight)
    assert len(list(sim.quantizers())) == len(list(sim.named_quantizers()))
