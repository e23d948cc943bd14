"""AIMET's corrections before and around a simulation: equalization, batch norm statistics, learned rounding."""

import importlib
import json

import pytest
import torch
from aimet_networks import Everything, Network, calibrated, differences, images, prepared_model
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.core.functional import Add
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.aimet import bn_reestimation, cross_layer_equalization, quantsim
from qkernels.frontends.aimet.adaround_weight import Adaround, AdaroundParameters

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def original():
    found = pytest.importorskip("aimet_torch", reason="needs aimet-torch and torchvision", exc_type=ImportError)
    parts = "batch_norm_fold bn_reestimation cross_layer_equalization model_preparer quantsim adaround.adaround_weight"
    for part in parts.split():
        importlib.import_module(f"aimet_torch.{part}")
    return found


def state(model):
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    return {name: t.as_subclass(torch.Tensor).clone() for name, t in tensors.items()}


# ---- equalization ----------------------------------------------------------------------------------------------------


class Mobile(nn.Module):
    """Everything that equalization knows: pairs, depthwise between, high biases, a fork, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1, self.r1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.c2, self.b2, self.r2 = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.c3, self.b3 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.c4, self.r4, self.c5 = nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.b6, self.r6 = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), nn.PReLU()
        self.c7, self.clip, self.c8 = nn.Conv2d(5, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1)
        self.add = Add()

    def forward(self, x):
        x = self.b3(self.c3(self.r2(self.b2(self.c2(self.r1(self.b1(self.c1(x))))))))
        x = self.add(self.c5(self.r4(self.c4(x))), x)
        return self.c8(self.clip(self.c7(self.r6(self.b6(self.up(x))))))


def mobile(seed=0):
    torch.manual_seed(seed)
    model = Mobile().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 3.0)
            module.weight.data.uniform_(0.05, 1.5)
            module.bias.data.normal_(0.5, 1.0)
    return model


def test_equalized_models_keep_their_function_but_for_absorbed_biases():
    model, x = mobile(), torch.randn(2, 3, 12, 12)
    expected = model(x)
    assert cross_layer_equalization.equalize_model(model, dummy_input=x) is None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    written, read = model.c1.weight.abs().flatten(1).amax(1), model.c2.weight.abs().flatten(1).amax(1)
    torch.testing.assert_close(written, read, rtol=1e-5, atol=0)
    inner = slice(None), slice(None), slice(4, -4), slice(4, -4)  # at the borders a padded layer reads zeros
    assert (model(x)[inner] - expected[inner]).norm() < 0.1 * expected[inner].norm()


@pytest.mark.parametrize("seed", range(3))
def test_equalized_weights_and_biases_are_those_of_aimet(original, seed):
    mine, theirs, x = mobile(seed), mobile(seed), torch.randn(2, 3, 12, 12)
    cross_layer_equalization.equalize_model(mine, dummy_input=x)
    theirs.add = original.nn.modules.custom.Add()
    original.cross_layer_equalization.equalize_model(theirs, dummy_input=x)
    mine, theirs = state(mine), state(theirs)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


def test_a_folded_model_is_equalized_with_its_pairs():
    one, other, x = mobile(), mobile(), torch.randn(2, 3, 12, 12)
    cross_layer_equalization.equalize_model(one, input_shapes=(2, 3, 12, 12))
    pairs = aimet.batch_norm_fold.fold_all_batch_norms(other, input_shapes=(2, 3, 12, 12))
    cross_layer_equalization.equalize_bn_folded_model(other, None, pairs, dummy_input=x)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(InvalidArgument, match="equalize_bn_folded_model: give input_shapes or dummy_input"):
        cross_layer_equalization.equalize_bn_folded_model(other, None, pairs)


# ---- batch norm statistics -------------------------------------------------------------------------------------------


def with_norms(api, model=Network):
    """A simulation whose batch norms were not folded."""
    torch.manual_seed(0)
    network = model().eval()
    with torch.no_grad():
        next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)).weight[1] = -0.5  # turns a channel around
    prepared = api.model_preparer.prepare_model(network)
    sim = api.quantsim.QuantizationSimModel(prepared, dummy_input=images(model), default_param_bw=4)
    with api.nn.compute_encodings(sim.model):
        sim.model(images(model))
    return sim


def test_statistics_are_reestimated_on_the_first_batches_and_come_back():
    sim, batches = with_norms(aimet), [images(seed=seed) for seed in range(5)]
    before, training = state(sim.model), sim.model.train().training
    handle = bn_reestimation.reestimate_bn_stats(sim.model, batches, num_batches=3)
    assert sim.model.training is training
    hidden = [sim.model.eval().conv1(x) for x in batches[:3]]
    means = torch.stack([h.mean([0, 2, 3]) for h in hidden]).mean(0)
    torch.testing.assert_close(sim.model.bn_1.running_mean, means)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in state(sim.model).items())
    with bn_reestimation.reestimate_bn_stats(sim.model, batches):
        assert not torch.equal(sim.model.bn_1.running_mean, before["bn_1.running_mean"])
    assert torch.equal(sim.model.bn_1.running_mean, before["bn_1.running_mean"])


def test_an_error_while_reestimating_leaves_everything_as_it_was():
    sim = with_norms(aimet)
    bn_reestimation.reestimate_bn_stats(sim.model, [images()])
    before = state(sim.model)
    with pytest.raises(InvalidArgument, match=r"pass the inputs alone"):
        bn_reestimation.reestimate_bn_stats(sim.model, [(images(), torch.zeros(8))])
    assert all(torch.equal(value, before[name]) for name, value in state(sim.model).items())
    with pytest.raises(InvalidArgument, match="no batch normalization"):
        bn_reestimation.reestimate_bn_stats(calibrated().model, [images()])


def test_reestimated_statistics_are_those_of_aimet(original):
    found = []
    for api in (aimet, original):
        sim, batches = with_norms(api), [(images(seed=seed), seed) for seed in range(4)]
        api.bn_reestimation.reestimate_bn_stats(sim.model, batches, 3, lambda model, batch: model(batch[0]))
        found.append({name: t for name, t in state(sim.model).items() if "running" in name})
    assert len(found[0]) == 4
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


def folded_after_training(api, verb, model=Network):
    """The way of AIMET's tutorial: training with batch norms, new statistics, then folding into the scales."""
    sim = with_norms(api, model)
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=1e-2)
    for seed in range(3):
        nn.functional.cross_entropy(sim.model.train()(images(model, seed=seed)), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    api.bn_reestimation.reestimate_bn_stats(sim.model.eval(), [images(model, seed=seed) for seed in range(4)])
    with torch.no_grad():
        before = sim.model(images(model)).as_subclass(torch.Tensor)
        verb(sim)
        return sim, before, sim.model(images(model)).as_subclass(torch.Tensor)


@pytest.mark.parametrize("model", [Network, Everything])
def test_folding_into_scales_keeps_what_is_simulated_and_makes_it_integer(model):
    sim, before, after = folded_after_training(aimet, aimet.batch_norm_fold.fold_all_batch_norms_to_scale, model)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-2 * float(before.abs().max()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in sim.model.modules())
    converted = sim.convert()
    assert qkernels.verify(sim.prepared(), converted, [images(model)]).total_mismatches == 0
    assert {row.kind for row in converted.report.stayed_float} <= {"Softmax"}


@pytest.mark.parametrize("model", [Network, Everything])
def test_quantizers_around_batch_norms_and_what_is_folded_are_those_of_aimet(original, tmp_path, model):
    theirs, mine = with_norms(original, model), with_norms(aimet, model)
    places = [{name for name, _ in sim.named_quantizers()} for sim in (mine, theirs)]
    assert places[0] == places[1]
    theirs, _, expected = folded_after_training(original, original.batch_norm_fold.fold_all_batch_norms_to_scale, model)
    mine, _, after = folded_after_training(aimet, aimet.batch_norm_fold.fold_all_batch_norms_to_scale, model)
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    theirs.export(str(tmp_path), "net", dummy_input=images(model))
    table, expected = mine.module_encodings(), json.loads((tmp_path / "net_torch.encodings").read_text())
    for name, rows in expected["param_encodings"].items():
        for row, wanted in zip(table["param_encodings"][name], rows, strict=True):
            assert row["scale"] == pytest.approx(wanted["scale"], rel=1e-3)


def test_folding_into_scales_needs_a_grid_a_channel():
    sim = with_norms(aimet)
    sim.model.conv1.param_quantizers["weight"] = None
    with pytest.raises(Unsupported, match="conv1 has no calibrated grid for each channel"):
        aimet.batch_norm_fold.fold_all_batch_norms_to_scale(sim)


# ---- learned rounding ------------------------------------------------------------------------------------------------


def parameters(api, count=4, **options):
    return api(
        [images(seed=seed) for seed in range(count)],
        count,
        default_num_iterations=200,
        default_reg_param=0.01,
        **options,
    )


def adarounded(tmp_path, **options):
    model = prepared_model()
    params = parameters(AdaroundParameters)
    how = {"default_param_bw": 4, "default_quant_scheme": "min_max"} | options
    return model, Adaround.apply_adaround(model, images(), params, str(tmp_path), "rounded", **how)


def frozen(model, tmp_path, api=quantsim, bits=4):
    sim = api.QuantizationSimModel(model, dummy_input=images(), default_param_bw=bits, quant_scheme="min_max")
    sim.set_and_freeze_param_encodings(tmp_path / "rounded.encodings")
    sim.compute_encodings(lambda m, _: m(images()), None)
    return sim


def test_adaround_chooses_neighbouring_codes_that_the_simulation_keeps(tmp_path):
    model, rounded = adarounded(tmp_path)
    assert [type(m) for m in rounded.modules()][1:] == [type(m) for m in model.modules()][1:]
    sim = frozen(rounded, tmp_path)
    moved = 0
    for name in ("conv1", "conv2", "linear"):
        before, after = model.get_submodule(name).weight, rounded.get_submodule(name).weight
        quantizer = sim.model.get_submodule(name).param_quantizers["weight"]
        torch.testing.assert_close(quantizer(after), after, rtol=0, atol=1e-6)  # it is on its grid
        step = quantizer.get_scale()
        assert ((after - before).abs() <= step * 1.001).all()
        moved += int(((after - quantizer(before)).abs() > step / 2).sum())
    assert moved > 0
    x, float_model = images(seed=9), model.eval()
    nearest = calibrated(default_param_bw=4, quant_scheme="min_max")
    with torch.no_grad():
        errors = [(m(x) - float_model(x)).square().sum() for m in (sim.model, nearest.model)]
    assert errors[0] < errors[1]
    assert qkernels.verify(sim.prepared(), sim.convert(), [x]).total_mismatches == 0


def test_adaround_takes_other_bits_for_some_modules_and_leaves_others_alone(tmp_path):
    model = prepared_model()
    params = parameters(AdaroundParameters)
    how = {"param_bw_override_list": [(model.conv1, 6)], "ignore_quant_ops_list": [model.linear]}
    rounded = Adaround.apply_adaround(model, images(), params, tmp_path, "rounded", **how)
    table = json.loads((tmp_path / "rounded.encodings").read_text())["param_encodings"]
    assert {name: rows[0]["bitwidth"] for name, rows in table.items()} == {"conv1.weight": 6, "conv2.weight": 4}
    assert torch.equal(rounded.linear.weight, model.linear.weight)
    other = nn.Linear(2, 2)
    with pytest.raises(InvalidArgument, match="no such module"):
        Adaround.apply_adaround(model, images(), params, tmp_path, "x", param_bw_override_list=[(other, 4)])
    with pytest.raises(Unsupported, match="default_beta_range"):
        parameters(AdaroundParameters, default_beta_range=(30, 2))


def test_adaround_writes_aimets_encodings_and_gains_as_much(original, tmp_path):
    _, rounded = adarounded(tmp_path / "mine")
    theirs = original.adaround.adaround_weight
    model = prepared_model(api=original)
    params = parameters(theirs.AdaroundParameters, forward_fn=lambda m, x: m(x))
    how = {"default_param_bw": 4, "default_quant_scheme": original.common.defs.QuantScheme.post_training_tf}
    expected = theirs.Adaround.apply_adaround(model, images(), params, str(tmp_path / "theirs"), "rounded", **how)
    tables = [json.loads((tmp_path / who / "rounded.encodings").read_text()) for who in ("mine", "theirs")]
    assert not list(differences(*tables))
    x, errors = images(seed=9), []
    for candidate in (rounded, expected, model):
        sim = frozen(candidate, tmp_path / "mine")  # puts what is between two codes onto one of them
        for name, module in sim.named_qmodules():
            module.output_quantizers[0] = None
            if name == "conv1":
                module.input_quantizers[0] = None
        with torch.no_grad():
            errors.append(float((sim.model(x) - model(x)).square().sum()))
    mine, theirs, nearest = errors
    assert mine < 0.7 * nearest
    assert mine < 1.5 * theirs


# ---- encodings of 2.0.0, and other kinds of grids --------------------------------------------------------------------


@pytest.mark.parametrize("model", [Network, Everything])
def test_encodings_of_2_go_back_in_without_loss(tmp_path, model):
    sim = calibrated(model, default_param_bw=4)
    sim.export(tmp_path, "net", dummy_input=images(model), encoding_version="2.0.0")
    content = json.loads((tmp_path / "net.encodings").read_text())
    assert set(content) == {"version", "producer", "encodings"}
    other = quantsim.QuantizationSimModel(prepared_model(model), dummy_input=images(model))
    other.load_encodings(tmp_path / "net.encodings", partial=False)
    assert other.encodings("2.0.0") == sim.encodings("2.0.0")
    x = images(model, seed=3)
    assert torch.equal(other.convert()(x), sim.convert()(x))


def test_encodings_of_2_are_those_of_aimet(original):
    """Which writes them next to an ONNX file only: here entry by entry, by the encodings of its quantizers."""
    mine, theirs = calibrated(Everything, default_param_bw=4), calibrated(Everything, original, default_param_bw=4)
    found = {entry.pop("name"): entry for entry in mine.encodings("2.0.0")["encodings"]}
    compared = 0
    for path, module in theirs.model.named_modules():
        for name, quantizer in getattr(module, "param_quantizers", {}).items():
            if quantizer is not None:
                encoding = quantizer.get_encodings()
                encoding._hint_input_shape(tuple(getattr(module, name).shape))
                expected = encoding.to_qnn_encoding_dict("2.0.0")
                expected["axis"] %= module.weight.dim()
                assert not list(differences(found[f"{path}.{name}"], expected))
                compared += 1
        outputs = getattr(module, "output_quantizers", [])
        for name, entry in found.items():
            if len(outputs) and outputs[0] is not None and name.startswith(f"/{path}/") and "_output_0" in name:
                assert not list(differences(entry, outputs[0].get_encodings().to_qnn_encoding_dict("2.0.0")))
                compared += 1
    assert compared > 12


def test_what_2_cannot_say_and_what_it_says_otherwise_is_refused():
    strict = {"defaults": {"params": {"is_quantized": True, "is_symmetric": True}, "strict_symmetric": True}}
    with pytest.raises(Unsupported, match=r"encodings of 2\.0\.0 have no grid of 255 codes"):
        calibrated(config_file=strict).encodings("2.0.0")
    entry = {"name": "conv1.weight", "output_dtype": "int4", "y_scale": [[0.1]], "block_size": 4}
    with pytest.raises(Unsupported, match=r"encodings\[0\]: only intN"):
        calibrated().load_encodings({"encodings": [entry]})


def test_a_quantizer_of_ones_own_takes_a_range_or_watches_its_own_data():
    sim = calibrated()
    weight = aimet.quantization.affine.QuantizeDequantize(shape=(8, 1, 1, 1), bitwidth=4, symmetric=True)
    weight.set_range(-0.8, 0.7)
    output = aimet.quantization.affine.QuantizeDequantize(shape=(), bitwidth=8, symmetric=False)
    with output.compute_encodings():
        output(torch.tensor([-1.0, 4.0]))
        output(torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(
        torch.stack([output.get_min(), output.get_max()]), torch.tensor([-1.0, 5.0]), atol=2e-2, rtol=0
    )
    torch.testing.assert_close(weight.get_scale().flatten(), torch.full((8,), 0.1))
    sim.model.conv1.param_quantizers["weight"], sim.model.linear.output_quantizers[0] = weight, output
    assert len(sim.model.linear(torch.randn(8, 784)).unique()) <= 256
    assert qkernels.verify(sim.prepared(), sim.convert(), [images()]).total_mismatches == 0


def test_the_ends_of_a_range_have_the_shape_of_the_grids():
    torch.manual_seed(0)
    x, model = torch.randn(4, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    sim = quantsim.QuantizationSimModel(model, x)
    sim.compute_encodings(lambda model: model(x))
    weight, output = sim.model[0].param_quantizers["weight"], sim.model[1].output_quantizers[0]
    assert weight.min.shape == weight.max.shape == weight.get_min().shape == (16, 1)
    assert output.min.shape == output.max.shape == output.get_max().shape == ()
    limited = sim.model[0].weight.clamp(weight.min, weight.max)
    torch.testing.assert_close(limited.float(), sim.model[0].weight, rtol=0, atol=1e-6)
    with torch.no_grad():
        weight.min.copy_(weight.get_min())
    sim.model(x).sum().backward()
    assert weight.min.grad.shape == weight.min.shape
    assert isinstance(sim.model[0], aimet.nn.QuantizedLinear)
    assert not isinstance(sim.model[0], aimet.nn.QuantizedConv2d)


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(3, 6, 3), (4, 4, 2), (3, 3, 3)])
def test_a_transposed_convolution_of_several_groups_is_what_is_simulated(channels, outputs, groups):
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(channels, outputs, 2, 2, groups=groups), torch.randn(2, channels, 4, 4)
    sim = quantsim.QuantizationSimModel(nn.Sequential(layer, nn.ReLU()).eval(), x)
    sim.compute_encodings(lambda model: model(x))
    assert sim.model[0].param_quantizers["weight"].get_scale().numel() == outputs // groups
    assert qkernels.verify(sim.prepared(), sim.convert(), [x]).total_mismatches == 0
    torch.testing.assert_close(sim.convert()(x), sim.model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [(-8, 7), (-7, 7), (0, 15), (-128, 127)])
def test_a_quantizer_may_be_given_by_its_codes(ends):
    from qkernels.frontends.aimet.quantization.affine import QuantizeDequantize

    quantizer = QuantizeDequantize((), qmin=ends[0], qmax=ends[1], symmetric=ends[0] < 0)
    assert (quantizer.qmin, quantizer.qmax) == ends
    assert quantizer.bitwidth == (8 if ends[1] > 15 else 4)


def test_what_a_quantizer_cannot_be_is_refused():
    new = aimet.QuantizeDequantize
    with pytest.raises(Unsupported, match="no bitwidth has the codes from -7 to 6"):
        new((), qmin=-7, qmax=6, symmetric=True)
    with pytest.raises(Unsupported, match="from -1 to 15"):
        new((), qmin=-1, qmax=15, symmetric=False)
    with pytest.raises(Unsupported, match="block_size has no counterpart"):
        new((8, 1, 1, 1), 4, True, block_size=(1, 1, 3, 3))


def test_bits_and_symmetry_of_a_quantizer_may_be_set():
    sim = calibrated()
    weight, output = sim.model.conv1.param_quantizers["weight"], sim.model.module_relu.output_quantizers[0]
    highest, high = weight.get_max().clone(), output.get_max().clone()
    weight.bitwidth, output.bitwidth = 4, 3
    assert len(sim.model.module_relu(images()).unique()) <= 8
    assert weight.extra_repr() == "shape=[8, 1, 1, 1], bitwidth=4, symmetric=True"
    assert ((weight.get_max() / highest - 1).abs() < 0.15).all()  # about the same range: 7 of 8 steps instead of 127
    torch.testing.assert_close(output.get_max(), high)
    output.symmetric = True
    with aimet.nn.compute_encodings(sim.model):
        sim.model(images())
    assert sim.module_encodings()["activation_encodings"]["module_relu"]["output"]["0"]["is_symmetric"] == "True"
    assert qkernels.verify(sim.prepared(), sim.convert(), [images()]).total_mismatches == 0
