"""The front end for torch.ao scripts (eager mode), against torch.ao itself."""

import copy
import io
import warnings

import pytest
import torch
from mobilenet_v2 import FULL, SMALL
from torch import nn
from torch_ao_models import calibrated, images, ours, per_channel, torch_converted, torchs, train

import qkernels
from qkernels.core.prepare import quantizers
from qkernels.errors import InvalidArgument, InvalidState, Unsupported
from qkernels.frontends import torch_ao
from qkernels.testing import supported_isas

ao = pytest.importorskip("torch.ao.quantization")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("seeded_engine")]


# ---- observers -------------------------------------------------------------------------------------------------------

OBSERVERS = [
    ("MinMaxObserver", {}),
    ("MinMaxObserver", {"reduce_range": True}),
    ("MinMaxObserver", {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}),
    ("MinMaxObserver", {"quant_min": 0, "quant_max": 15}),
    ("MovingAverageMinMaxObserver", {"averaging_constant": 0.1}),
    ("MovingAverageMinMaxObserver", {"quant_min": 0, "quant_max": 255, "reduce_range": True}),
    ("HistogramObserver", {}),
    ("HistogramObserver", {"reduce_range": True}),
    ("HistogramObserver", {"dtype": torch.qint8, "eps": 2**-12}),
    ("PerChannelMinMaxObserver", {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}),
    ("PerChannelMinMaxObserver", {"ch_axis": 1}),
    ("MovingAveragePerChannelMinMaxObserver", {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}),
    ("FixedQParamsObserver", {"scale": 1 / 256, "zero_point": 0}),
    ("MinMaxObserver", {"dtype": torch.int16, "qscheme": torch.per_tensor_symmetric}),
    ("MinMaxObserver", {"dtype": torch.uint16}),
    ("MovingAverageMinMaxObserver", {"dtype": torch.qint32, "quant_min": -2000, "quant_max": 2000}),
    ("PerChannelMinMaxObserver", {"dtype": torch.int16, "qscheme": torch.per_channel_symmetric}),
]


@pytest.mark.parametrize(("name", "options"), OBSERVERS)
def test_observers_choose_the_grids_of_torch(name, options):
    mine, theirs = (getattr(api, name).with_args(**options)() for api in (torch_ao, ao))
    for seed in range(4):
        x = images(seed=seed) * (1 + seed)
        mine(x), theirs(x)
    (scale, zero_point), (expected_scale, expected_zero_point) = mine.calculate_qparams(), theirs.calculate_qparams()
    assert torch.equal(scale, expected_scale.reshape(-1).float())
    assert torch.equal(zero_point, expected_zero_point.reshape(-1).int())


def test_names_without_a_counterpart_say_so():
    with pytest.raises(AttributeError, match="has no quantize_jit; it takes the place of"):
        torch_ao.quantize_jit  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'prepar_qat'; did you mean 'prepare_qat'"):
        torch_ao.prepar_qat  # noqa: B018


def test_grids_of_more_than_eight_bits_are_simulated_and_listed():
    """Which torch's own convert has no layers for."""
    model = torch_ao.QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))).eval()
    model.qconfig = torch_ao.QConfig(
        torch_ao.MinMaxObserver.with_args(dtype=torch.uint16), torch_ao.default_per_channel_weight_observer
    )
    exact, x = model(images()), images()
    torch_ao.prepare(model, inplace=True)
    model(x)
    prepared, converted = torch_ao.prepared(model), torch_ao.convert(model)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    assert "65536 codes" in next(row.reason for row in prepared.report if row.name == "module.0")
    assert (converted(x) - exact).abs().max() < 0.05
    with pytest.raises(Unsupported, match="say quant_min and quant_max"):
        torch_ao.MinMaxObserver(dtype=torch.qint32)


@pytest.mark.parametrize("seed", range(3))
def test_fake_quantize_rounds_as_torch_and_passes_the_same_gradients(seed):
    options = {"quant_min": 0, "quant_max": 255, "reduce_range": True}
    mine, theirs = (api.FakeQuantize.with_args(**options)() for api in (torch_ao, ao))
    x = images(seed=seed)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(i) for module, i in zip((mine, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for module, api in ((mine, torch_ao), (theirs, ao)):
        module.apply(api.disable_observer)
        module(100 * x)
    assert torch.equal(mine.scale, theirs.scale)


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
@pytest.mark.parametrize("getter", ["get_default_qconfig", "get_default_qat_qconfig"])
def test_default_qconfigs_mean_what_torchs_mean(backend, getter):
    from qkernels.frontends.torch_ao.parse import factory_recipe

    mine, theirs = (getattr(api, getter)(backend) for api in (torch_ao, ao))
    assert factory_recipe(mine.activation) == factory_recipe(theirs.activation)
    assert factory_recipe(mine.weight) == factory_recipe(theirs.weight)


# ---- fusing ----------------------------------------------------------------------------------------------------------


def test_fusing_keeps_the_function():
    model, x = ours().eval(), images()
    assert torch.allclose(copy.deepcopy(model).fuse()(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("chain", "message"),
    [(["conv1", "relu"], "'conv'"), (["relu", "conv"], "fusable are"), (["conv", "bn"], "fuse_modules_qat")],
)
def test_fusing_what_cannot_be_fused_says_why(chain, message):
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU()}).train()
    with pytest.raises(InvalidArgument, match=message):
        torch_ao.fuse_modules(model, chain)


def test_hooks_move_to_the_fused_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    seen = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[1].register_forward_hook(lambda *_: seen.append("after"))
    torch_ao.fuse_modules(model, ["0", "1"])(images())
    assert seen == ["before", "after"]


# ---- after training --------------------------------------------------------------------------------------------------


def test_eager_script_of_the_tutorial():
    model, x = ours(), images()
    expected = model.eval()(x)
    model = calibrated(model, torch_ao, torch_ao.get_default_qconfig("x86"), [x])
    assert "HistogramObserver" in str(model.features[1].conv)
    prepared = torch_ao.prepared(model)
    assert torch_ao.convert(model, inplace=True) is model
    assert "QConv" in str(model.features[1].conv[0][0])
    assert "activation_post_process" not in str(model)
    assert (model(x) - expected).norm() < 0.1 * expected.norm()
    assert qkernels.verify(prepared, model, [x]).total_mismatches == 0
    assert not prepared.report.stayed_float


def test_convert_leaves_the_model_alone_unless_in_place():
    model = calibrated(ours(), torch_ao, torch_ao.default_qconfig, [images()])
    before = model(images())
    torch_ao.convert(model)
    assert torch.equal(model(images()), before)


def layers_in_order(model, is_torch):
    """The codes that each layer stored, in order of execution."""
    found = []

    def note(module, args, output):
        if is_torch and output.is_quantized:
            found.append(output.int_repr())
        elif not is_torch and output.dtype == torch.uint8:
            found.append(output.clone())

    for module in model.modules():
        if type(module).__name__ == "QFunctional":
            add = module.add
            module.add = lambda a, b, add=add, m=module: (r := add(a, b), note(m, (), r))[0]
        elif hasattr(module, "kind") or (is_torch and type(module).__module__.startswith("torch.ao.nn")):
            module.register_forward_hook(note)
    return found


@pytest.mark.parametrize("prepared_by", [torch_ao, ao], ids=["ours", "torch"])
@pytest.mark.parametrize(("layout", "size"), [(SMALL, 24), (FULL, 96)], ids=["small", "full"])
def test_converted_layers_are_bit_identical_to_fbgemm(prepared_by, layout, size):
    # These sizes leave maps of 3 x 3, whose mean is never a tie: torch breaks ties of averages, too, in another way.
    x = images(8, size)
    torch.manual_seed(0)
    mine = torch_ao.convert(calibrated(torchs(100, layout), prepared_by, per_channel(prepared_by), [x]))
    torch.manual_seed(0)
    theirs = torch_converted(calibrated(torchs(100, layout), ao, per_channel(ao), [x]))
    grid = next(m for m in mine.modules() if getattr(m, "kind", "") == "quantize").out_qparams
    x = grid.dequantize(grid.quantize(x))  # nor is the input a tie
    codes, expected = layers_in_order(mine, False), layers_in_order(theirs, True)
    with torch.no_grad():
        assert torch.equal(mine(x), theirs(x))
    assert len(codes) > (50 if layout is FULL else 15)
    for output in codes:  # ours merge some layers of torch's, never the other way round
        while not (expected[0].shape == output.shape and torch.equal(expected[0], output)):
            expected.pop(0)


@pytest.mark.parametrize(
    ("qconfig", "ratio"), [(per_channel(ao), 0.967), (ao.default_qconfig, 1.006)], ids=["per channel", "per tensor"]
)
def test_size_is_that_of_torch(qconfig, ratio):
    """Scales of float32 instead of float64 make up for more tensors; a tensor is 200 bytes of its file."""
    x = images()
    model = calibrated(torchs(1000, FULL), ao, qconfig, [x])
    sizes = []
    for converted in (torch_ao.convert(model), torch_converted(model)):
        file = io.BytesIO()
        torch.save(converted.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] / sizes[1] == pytest.approx(ratio, abs=0.005)


def test_two_blocks_in_one_quantized_region_and_float_around():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AvgPool2d(2))
            self.head = nn.Linear(8, 4)
            self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()

        def forward(self, x):
            x = self.dequant(self.body(self.quant(self.stem(x))))
            return self.head(x.mean([2, 3]))

    model = Net().eval()
    model.qconfig, model.stem.qconfig, model.head.qconfig = torch_ao.default_qconfig, None, None
    torch_ao.prepare(model, inplace=True)
    x = images()
    expected = model(x)
    converted = torch_ao.convert(model)
    assert type(converted.stem) is nn.Conv2d
    assert type(converted.head) is nn.Linear
    assert (converted(x) - expected).norm() < 0.05 * expected.norm()


def test_a_layer_without_a_stub_before_it_is_an_error_that_names_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    model.qconfig = torch_ao.default_qconfig
    torch_ao.prepare(model, inplace=True)
    model(images())
    with pytest.raises(InvalidState, match=r"0 has a qconfig.*QuantStub"):
        torch_ao.convert(model)
    wrapped = torch_ao.QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).eval()
    wrapped.qconfig = torch_ao.default_qconfig
    torch_ao.prepare(wrapped, inplace=True)
    wrapped(images())
    assert torch_ao.convert(wrapped)(images()).shape == (4, 4, 30, 30)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_transposed_convolution_has_a_grid_for_each_output_channel(axis, groups):
    """As everywhere in qkernels, whatever axis the observer names; torch.ao refuses to prepare it."""
    network = nn.Sequential(torch_ao.QuantStub(), nn.ConvTranspose2d(4, 6, 3, 2, groups=groups), torch_ao.DeQuantStub())
    observer = torch_ao.default_per_channel_weight_observer.with_args(ch_axis=axis)
    network.eval().qconfig = torch_ao.QConfig(torch_ao.default_observer, observer)
    prepared = torch_ao.prepare(network)
    x = torch.randn(2, 4, 7, 7)
    prepared(x)
    ours, converted = torch_ao.prepared(prepared, x), torch_ao.convert(prepared, example_inputs=x)
    weight = network[1].weight.detach().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    weights = next(q for q in quantizers(ours) if q.source == "1.weight")
    torch.testing.assert_close(weights.qparams().scale, weight.flatten(1).abs().amax(1) / 127.5, rtol=1e-4, atol=0)
    assert qkernels.verify(ours, converted, [x]).total_mismatches == 0


def test_no_data_is_an_error_that_names_the_observer():
    model = ours().eval().fuse()
    model.qconfig = torch_ao.default_qconfig
    torch_ao.prepare(model, inplace=True)
    with pytest.raises(InvalidState, match="saw no data"):
        torch_ao.convert(model, example_inputs=images())


def test_convert_without_prepare_is_an_error():
    with pytest.raises(InvalidState, match="call prepare first"):
        torch_ao.convert(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), example_inputs=images())


def test_no_qconfig_is_an_error():
    with pytest.raises(InvalidArgument, match="qconfig"):
        torch_ao.prepare(ours().eval())


def test_what_has_no_integers_is_an_error():
    with pytest.raises(Unsupported, match="dtype"):
        torch_ao.MinMaxObserver(dtype=torch.float16)
    with pytest.raises(InvalidArgument, match="not an instance"):
        torch_ao.QConfig(torch_ao.MinMaxObserver(), torch_ao.default_weight_observer)
    with pytest.raises(InvalidArgument, match="x86"):
        torch_ao.get_default_qconfig("cuda")


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_script_of_the_tutorial():
    model = ours().fuse(is_qat=True)
    parameters = set(model.parameters())
    model.qconfig = torch_ao.get_default_qat_qconfig("x86")
    torch_ao.prepare_qat(model, inplace=True)
    assert set(model.parameters()) == parameters  # an optimizer made before still works
    for epoch in range(3):
        train(model, 2)
        if epoch == 1:
            model.apply(torch_ao.disable_observer)
            model.apply(torch_ao.torch.nn.intrinsic.qat.freeze_bn_stats)
        converted = torch_ao.convert(model.eval(), inplace=False)
        x = images()
        assert qkernels.verify(torch_ao.prepared(model), converted, [x]).total_mismatches == 0
        with torch.no_grad():
            assert (converted(x) - model(x)).norm() < 0.15 * model(x).norm()


@pytest.mark.parametrize("mode", [True, False])
def test_without_rounding_a_model_for_training_calibrates_as_torchs(mode):
    """Observers go on, in eval mode too. While training torch folds norms by the statistics of the step before."""
    found = []
    for api, make in ((torch_ao, ours), (ao, torchs)):
        torch.manual_seed(0)
        model = make().fuse(is_qat=True)
        model.classifier[0].p = 0.0  # at random
        model.qconfig = api.get_default_qat_qconfig("x86")
        api.prepare_qat(model, inplace=True).apply(api.disable_fake_quant).train(mode)
        with torch.no_grad():
            for seed in range(3):
                model(images(seed=seed))
        found.append(torch_ao.qparams.of_model(model))
        converted = torch_ao.convert(model, example_inputs=images())
        assert qkernels.verify(torch_ao.prepared(model, images()), converted, [images()]).total_mismatches == 0
    mine, theirs = found
    assert {path for path, table in theirs.items() if "weight" in table} == {
        path for path, module in model.named_modules() if hasattr(module, "weight_fake_quant")
    }
    for path, table in theirs.items():
        for key, grid in table.items():
            got = (mine.get(f"{path}.0", {}) | mine.get(path, {}))[key]  # ours are a layer and its clamp
            rtol = 2e-3 if mode and key == "weight" else 1e-5
            torch.testing.assert_close(got.scale, grid.scale, rtol=rtol, atol=0)
            assert got.offset == grid.offset


def test_quantize_and_quantize_qat_do_all_in_one():
    x, model = images(), ours().eval().fuse()
    model.qconfig = torch_ao.get_default_qconfig("x86")
    converted = torch_ao.quantize(model, lambda m, batch: m(batch), [x])
    assert (converted(x) - model(x)).norm() < 0.1 * model(x).norm()
    model = ours().fuse(is_qat=True)
    model.qconfig = torch_ao.get_default_qat_qconfig("x86")
    converted = torch_ao.quantize_qat(model, train, [2])
    assert any("QConv" in type(m).__name__ for m in converted.modules())
    assert not any("QConv" in type(m).__name__ for m in model.modules())


def test_disable_observer_and_freeze_bn_stats_stop_what_they_name():
    model = ours().fuse(is_qat=True)
    model.qconfig = torch_ao.default_qat_qconfig
    torch_ao.prepare_qat(model, inplace=True)
    train(model, 2)
    model.apply(torch_ao.disable_observer)
    model.apply(torch_ao.freeze_bn_stats)
    before = {name: b.clone() for name, b in model.named_buffers() if "quantizers.weight" not in name}
    train(model, 2)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)


def test_qat_in_eval_mode_is_an_error():
    model = ours().eval()
    model.qconfig = torch_ao.default_qat_qconfig
    with pytest.raises(InvalidState, match=r"model\.train"):
        torch_ao.prepare_qat(model)


ACTIVATIONS = [
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Hardsigmoid(),
    nn.GELU(),
    nn.Hardswish(),
    nn.ELU(),
    nn.LeakyReLU(),
]
MOVES = [nn.Hardtanh(), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Dropout(), nn.BatchNorm2d(4)]


@pytest.mark.parametrize("module", [*ACTIVATIONS, *MOVES], ids=lambda m: type(m).__name__)
def test_observers_stand_where_torchs_do_and_modules_without_one_have_torchs_grid(module):
    """Fixed grids of sigmoid, hardsigmoid and tanh; gelu and what moves values stay on that of the input."""
    x, found, outputs = torch.randn(4, 4, 12, 12, generator=torch.Generator().manual_seed(0)), [], []
    for api in (torch.ao.quantization, torch_ao):
        torch.manual_seed(0)
        layers = nn.Conv2d(4, 4, 3), module, nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)
        model = nn.Sequential(api.QuantStub(), *layers, api.DeQuantStub()).eval()
        model.qconfig = api.get_default_qconfig("fbgemm")
        prepared = api.prepare(model)
        prepared(x)
        found.append({name for name, _ in prepared.named_modules() if name.endswith("activation_post_process")})
        outputs.append(torch_ao.convert(prepared, example_inputs=x)(x))
        if api is not torch_ao:
            outputs.append(api.convert(prepared)(x))
    assert found[0] == found[1]
    assert torch.equal(outputs[0], outputs[2])
    # Without VNNI fbgemm saturates on codes above 127, which only the fixed grids have.
    if "avx512vnni" in supported_isas() or not isinstance(module, nn.Sigmoid | nn.Tanh | nn.Hardsigmoid):
        assert torch.equal(outputs[1], outputs[2])


def test_a_relu6_of_its_own_has_the_grid_of_its_observer():
    """torch's converted model leaves it on the grid of the layer before, which its simulation in training does not."""
    x = torch.randn(4, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(torch_ao.QuantStub(), nn.Conv2d(4, 4, 3), nn.ReLU6(), torch_ao.DeQuantStub()).eval()
    model.qconfig = torch_ao.get_default_qconfig("fbgemm")
    prepared = torch_ao.prepare(model)
    prepared(x)
    scale, _ = prepared[2].activation_post_process.calculate_qparams()
    steps = torch_ao.convert(prepared)(x) / scale
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.max() > 50


def test_models_trained_by_torch_convert():
    model = torchs().fuse(is_qat=True)
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    ao.prepare_qat(model, inplace=True)
    train(model, 3)
    model.eval()
    x = images()
    mine, theirs = torch_ao.convert(model), torch_converted(model)
    with torch.no_grad():
        expected = model(x)
        assert (mine(x) - expected).norm() < 1.5 * (theirs(x) - expected).norm() + 0.02 * expected.norm()


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_name_torch_is_torch_but_for_quantization():
    mine = torch_ao.torch
    assert mine.ao.quantization is torch_ao
    assert mine.nn.Linear is nn.Linear
    assert mine.float32 is torch.float32
    assert torch.ao.quantization is ao  # nothing is patched
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mine.nn.intrinsic.qat.freeze_bn_stats is torch_ao.freeze_bn_stats
        assert mine.ao.nn.intrinsic.qat.update_bn_stats is torch_ao.update_bn_stats
    assert mine.ao.nn.quantized is torch.ao.nn.quantized
    for name in ("observer.MinMaxObserver", "fake_quantize.FakeQuantize", "qconfig.QConfig", "quantize_fx.prepare_fx"):
        module, _, member = name.partition(".")
        assert getattr(getattr(mine.ao.quantization, module), member) is getattr(torch_ao, member)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scheme", [torch.per_channel_symmetric, torch.per_tensor_symmetric])
def test_weights_keep_to_the_range_of_their_observer_as_in_torch(scheme, seed):
    kind, outputs = "PerChannelMinMaxObserver" if scheme is torch.per_channel_symmetric else "MinMaxObserver", []
    for api in (ao, torch_ao):
        torch.manual_seed(seed)
        model = api.QuantWrapper(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))).eval()
        weight = getattr(api, kind).with_args(dtype=torch.qint8, qscheme=scheme, quant_min=-8, quant_max=7)
        model.qconfig = api.QConfig(api.default_observer, weight)
        api.prepare(model, inplace=True)
        model(images(seed=seed))
        outputs.append(api.convert(model)(images(seed=seed)))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_converting_twice_and_layers_with_hooks_say_what_helps():
    model = torch_ao.QuantWrapper(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).eval()
    model.qconfig = torch_ao.get_default_qconfig("x86")
    torch_ao.prepare(model, inplace=True)
    model(images())
    with pytest.raises(InvalidState, match="converted already"):
        torch_ao.convert(torch_ao.convert(model))
    model.module[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InvalidState, match=r"forward hooks.*Take them off"):
        torch_ao.convert(model)


def test_an_empty_batch_first_leaves_the_number_of_channels_open():
    observer, theirs = (
        torch_ao.PerChannelMinMaxObserver(ch_axis=0),
        torch.ao.quantization.PerChannelMinMaxObserver(ch_axis=0),
    )
    for x in (torch.empty(0, 6), torch.randn(4, 6)):
        observer(x)
        theirs(x)
    torch.testing.assert_close(observer.calculate_qparams()[0], theirs.calculate_qparams()[0])
