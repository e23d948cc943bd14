"""What scripts for torch.ao do beside the straight road: copies, checkpoints, classes of their own, other arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends import torch_ao
from qkernels.nn.dynamic import QDynamicLinear

ao = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")
APIS = pytest.mark.parametrize("api", [torch_ao, ao], ids=["ours", "torch"])


@pytest.fixture(autouse=True)
def _engine(seeded_engine):
    torch.backends.quantized.engine = "fbgemm"


def network(api=torch_ao) -> nn.Module:
    return api.QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))


def calibrated() -> nn.Module:
    model = network().eval()
    model.qconfig = torch_ao.get_default_qconfig("x86")
    return torch_ao.prepare(model)


def trained(qconfig=torch_ao.default_qat_qconfig) -> nn.Module:
    model = network().train()
    model.qconfig = qconfig
    return torch_ao.prepare_qat(model)


def images(seed=0) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- copies and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [calibrated, trained])
def test_a_copy_of_what_saw_data_converts_to_the_same_network(make, copied):
    model, x = make(), images()
    model(x)
    model.eval()
    assert torch.equal(torch_ao.convert(copied(model))(x), torch_ao.convert(model)(x))


def test_a_trained_model_that_came_from_a_state_dict_converts_without_an_example():
    first, second, x = trained(), trained(), images()
    first(x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch_ao.convert(second.eval())(x), torch_ao.convert(first.eval())(x))


# ---- observers -------------------------------------------------------------------------------------------------------


class Scalars(nn.Module):
    """One FloatFunctional for an addition and two operations with a number."""

    def __init__(self, functional, api):
        super().__init__()
        self.quant, self.dequant, self.functional = api.QuantStub(), api.DeQuantStub(), functional()

    def forward(self, x):
        x, f = self.quant(x), self.functional
        return self.dequant(f.mul_scalar(f.add_scalar(f.add(x, x), 1.0), 50.0))


def test_operations_with_a_number_are_not_observed_as_in_torch():
    """torch's own convert rounds the number to whole codes besides."""
    x, outputs = images(), []
    theirs = torch.ao.nn.quantized.FloatFunctional
    for api, functional in ((torch_ao, torch_ao.FloatFunctional), (torch_ao, theirs), (ao, theirs)):
        model = Scalars(functional, api).eval()
        model.qconfig = api.get_default_qconfig("fbgemm")
        model = api.prepare(model)
        model(x)
        outputs.append(api.convert(model)(x))
    errors = [(output - 50 * (2 * x + 1)).abs().max() for output in outputs]
    assert torch.equal(outputs[0], outputs[1])
    assert errors[0] <= errors[2]


class WiderMinMax(torch_ao.MinMaxObserver):
    """Not what the recipe of its base says."""

    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return 4 * scale, zero_point


class TorchsWiderMinMax(ao.MinMaxObserver):
    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return 4 * scale, zero_point


class OwnFakeQuantize(torch_ao.FakeQuantize):
    pass


OWN = [
    WiderMinMax,
    TorchsWiderMinMax,
    OwnFakeQuantize,
    torch_ao.FakeQuantize.with_args(observer=WiderMinMax),
    ao.FakeQuantize.with_args(observer=TorchsWiderMinMax),
]


@pytest.mark.parametrize("made", OWN)
def test_classes_of_the_users_own_are_refused_where_only_their_recipe_would_be_taken(made):
    qconfig = torch_ao.QConfig(made, torch_ao.default_weight_observer)
    match = r"is a class of your own; only eager prepare\(\) takes it"
    with pytest.raises(Unsupported, match="^quant: .*" + match):
        trained(qconfig)
    for mapping in (
        torch_ao.QConfigMapping().set_global(qconfig),
        torch_ao.QConfigMapping().set_object_type(nn.Conv2d, qconfig),
        torch_ao.QConfigMapping().set_global(torch_ao.QConfig(torch_ao.default_observer, made)),
    ):
        for verb in (torch_ao.prepare_fx, torch_ao.prepare_qat_fx):
            with pytest.raises(Unsupported, match=match):
                verb(network().module, mapping, (images(),))


@pytest.mark.parametrize("made", OWN[:2])
def test_eager_calibration_takes_the_grid_of_an_observer_of_the_users_own(made):
    scales = []
    for observer in (torch_ao.MinMaxObserver, made):
        torch.manual_seed(0)
        model = network().eval()
        model.qconfig = torch_ao.QConfig(observer, torch_ao.default_weight_observer)
        model = torch_ao.prepare(model)
        model(images())
        grids = torch_ao.qparams.write(torch_ao.qparams.of_model(model))
        scales.append(grids["module.2"]["output"]["scale"])
    torch.testing.assert_close(scales[1], 4 * scales[0])


def fixed(api):
    observer = api.FixedQParamsObserver.with_args(scale=1 / 64, zero_point=128)
    return api.FixedQParamsFakeQuantize.with_args(observer=observer)


@APIS
def test_training_keeps_a_fixed_grid_through_all_phases(api):
    model = network().train()
    model.qconfig = api.get_default_qat_qconfig("fbgemm")
    model.module[2].qconfig = api.QConfig(fixed(api), model.qconfig.weight)
    model, x = torch_ao.prepare_qat(model), 10 * images()
    for names in ([], ["disable_fake_quant", "enable_observer"], ["enable_fake_quant", "enable_observer"], []):
        for name in names:
            model.apply(getattr(torch_ao, name))
        model(x).square().mean().backward()
    quantizer = model.module[2].activation_post_process
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (1 / 64, 128)
    codes = torch_ao.convert(model.eval())(x) * 64 + 128
    assert torch.equal(codes, codes.round().clamp(0, 255))
    assert codes.min() == 0


def test_training_with_a_fixed_grid_rounds_as_torchs():
    outputs = []
    for api in (torch_ao, ao):
        torch.manual_seed(0)
        model = api.QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 3))).train()
        model.qconfig = api.QConfig(fixed(api), api.default_weight_fake_quant)
        outputs.append(api.prepare_qat(model)(images()))
    assert (
        outputs[0] - outputs[1]
    ).abs().max() <= 1 / 64  # a sum next to the edge between two codes may fall either way
    assert (outputs[0] == outputs[1]).float().mean() > 0.99


@APIS
def test_a_fixed_grid_in_a_mapping_is_refused_unless_it_is_torchs_default(api):
    qconfig = api.QConfig(fixed(api), api.default_weight_observer)
    for rule in (
        lambda m: m.set_global(qconfig),
        lambda m: m.set_module_name("2", qconfig),
        lambda m: m.set_object_type(nn.Conv2d, qconfig),
        lambda m: m.set_object_type(nn.Sigmoid, qconfig),
    ):
        with pytest.raises(Unsupported, match=r"QConfig.*: a fixed grid .*prepare_qat"):
            torch_ao.prepare_fx(network().module.eval(), rule(api.QConfigMapping()), (images(),))
    default = api.QConfig(api.default_fixed_qparams_range_neg1to1_observer, api.default_weight_observer)
    rules = torch_ao.mapping_recipe(api.QConfigMapping().set_object_type(torch.tanh, default)).overrides
    assert rules[-1].activation is None


# ---- quantize_dynamic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default_dynamic_qconfig", "per_channel_dynamic_qconfig"])
def test_dynamic_qconfigs_of_torch_are_taken(name):
    for api in (torch_ao, ao):
        model = torch_ao.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear: getattr(api, name)})
        assert isinstance(model[0], QDynamicLinear)


@pytest.mark.parametrize(
    ("qconfig", "error", "message"),
    [
        (ao.float16_dynamic_qconfig, Unsupported, r"quantize_dynamic: 0: .*torch\.float16"),
        (ao.float_qparams_weight_only_qconfig, Unsupported, "quantize_dynamic: 0: .*float_qparams"),
        (
            ao.QConfig(ao.default_observer, ao.MinMaxObserver.with_args(dtype=torch.qint8, quant_min=-8, quant_max=7)),
            Unsupported,
            "quantize_dynamic: 0: weights are torch.qint8 up to 127",
        ),
        ("int8", InvalidArgument, "quantize_dynamic: 0: must be a QConfig.*got 'int8'"),
    ],
)
def test_dynamic_qconfigs_that_are_not_int8_are_refused_by_path(qconfig, error, message):
    with pytest.raises(error, match=message):
        torch_ao.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {"0": qconfig})


def test_default_dynamic_qconfig_is_no_static_one():
    with pytest.raises(Unsupported, match=r"^quant: PlaceholderObserver"):
        trained(torch_ao.default_dynamic_qconfig)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["prepare_fx", "prepare_qat_fx"])
def test_a_mapping_that_is_a_dict_is_refused(verb):
    with pytest.raises(InvalidArgument, match=f"^{verb}: qconfig_mapping must be a QConfigMapping, got {{''"):
        getattr(torch_ao, verb)(network().module, {"": torch_ao.default_qconfig}, (images(),))


def test_quantize_takes_torchs_arguments():
    x, model = images(), network().eval()
    model.qconfig = torch_ao.get_default_qconfig("x86")
    run = lambda m, batch: m(batch)  # noqa: E731
    fresh = torch_ao.quantize(model, run, [x], mapping=None)
    assert fresh is not model
    with pytest.raises(Unsupported, match=r"quantize: mapping: .*got True"):
        torch_ao.quantize(model, run, [x], True)
    changed = torch_ao.quantize(model, run, [x], None, True)
    assert changed is model
    assert torch.equal(changed(x), fresh(x))


def test_quantize_qat_leaves_the_callers_model_in_its_mode_unless_in_place():
    model = network().eval()
    model.qconfig = torch_ao.default_qat_qconfig
    torch_ao.quantize_qat(model, lambda m: m(images()), [])
    assert not any(m.training for m in model.modules())
    assert torch_ao.quantize_qat(model, lambda m: m(images()), [], inplace=True) is model


@pytest.mark.parametrize("verb", ["fuse_modules", "fuse_modules_qat"])
def test_fusing_takes_torchs_defaults_and_nothing_else(verb):
    fuse, paths = getattr(torch_ao, verb), ["module.0", "module.1"]
    fused = fuse(network(), paths, fuse_custom_config_dict=None, fuser_func=None)
    assert type(fused.module[1]) is nn.Identity
    for wrong in ({"fuse_custom_config_dict": {"a": 1}}, {"fuse_costum_config_dict": None}):
        with pytest.raises(InvalidArgument, match=f"unknown arguments \\['{next(iter(wrong))}'\\]"):
            fuse(network(), paths, **wrong)
