"""The front end against AIMET itself, where it is installed (.ci/originals.sh)."""

import json

import pytest
import torch
import torch.nn.functional as F
from aimet_networks import Everything, Nested, Network, calibrated, differences, images, prepared_model
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
from qkernels.frontends.aimet import quantsim
from qkernels.frontends.aimet.config import DEFAULT

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def original():
    found = pytest.importorskip("aimet_torch", reason="needs aimet-torch and torchvision", exc_type=ImportError)
    from aimet_torch import batch_norm_fold, model_preparer, quantsim  # noqa: F401

    return found


@pytest.mark.parametrize("model", [Network, Everything, Nested])
@pytest.mark.parametrize("bits", [4, 8])
def test_encodings_and_logits_are_those_of_aimet(original, tmp_path, model, bits):
    theirs = calibrated(model, original, default_param_bw=bits)
    mine = calibrated(model, default_param_bw=bits)
    theirs.export(str(tmp_path), "net", dummy_input=images(model))
    expected = json.loads((tmp_path / "net_torch.encodings").read_text())
    got = mine.module_encodings()
    for table in ("activation_encodings", "param_encodings"):
        assert not list(differences(got[table], expected[table]))
    with torch.no_grad():
        x = images(model)
        assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-4)
    for file in ("net_torch.encodings", "net.encodings"):  # by module; by tensor of the graph beside it
        other = quantsim.QuantizationSimModel(prepared_model(model), dummy_input=images(model))
        other.load_encodings(tmp_path / file, partial=False)
        with torch.no_grad():
            for seed in range(3):
                x = images(model, seed=seed)
                expected = theirs.model(x).as_subclass(torch.Tensor)
                assert torch.allclose(other.model(x), expected, atol=1e-4)
                assert torch.allclose(other.convert()(x), expected, atol=1e-4)


def places(module):
    """Where a module has quantizers, and of which shape and kind those of its parameters are."""
    parameters = getattr(module, "param_quantizers", {}).items()
    output = getattr(module, "output_quantizers", [None])[0] is not None
    return output, {name: (tuple(q.shape), q.bitwidth, q.symmetric) for name, q in parameters if q is not None}


def test_quantizers_stand_behind_the_same_modules_as_in_aimet(original):
    shuffles = [nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Flatten(), nn.Unflatten(1, (2, 2))]
    resizes = [nn.Upsample(scale_factor=2, mode=mode) for mode in ("nearest", "bilinear")]
    pads = [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.5)]
    pools = [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2)]
    others = [nn.Identity(), nn.Dropout(), nn.GroupNorm(2, 4), nn.LogSoftmax(1), nn.Softplus(), nn.SELU()]
    weighted = [nn.BatchNorm2d(4), nn.PReLU(), nn.PReLU(4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(12)]
    convs = [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(4, 4, 3, groups=4)]
    chains = [(conv, act) for conv in (*convs, nn.Conv2d(4, 4, 3, groups=2)) for act in (nn.ReLU(), nn.ReLU6())]
    chains += [(nn.Conv2d(4, 4, 3), nn.Hardtanh()), (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU())]
    alone = (*shuffles, *resizes, nn.UpsamplingNearest2d(scale_factor=2), *pads, *pools, *others, *weighted)
    for middle in [*((module,) for module in alone), *chains]:
        model, found = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), *middle, nn.Hardswish()).eval(), []
        for api in (aimet, original):
            sim = api.quantsim.QuantizationSimModel(model, dummy_input=torch.rand(2, 3, 14, 14))
            found.append([places(module) for module in sim.model.children()])
        assert found[0] == found[1], middle


@pytest.mark.parametrize("model", [Network, Everything])
def test_without_supergroups_a_relu_shares_its_grid_with_what_it_reads_as_in_aimet(original, tmp_path, model):
    config = {key: value for key, value in DEFAULT.items() if key != "supergroups"} | {"supergroups": []}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config).replace("true", '"True"').replace("false", '"False"'))
    theirs, mine = (calibrated(model, api, config_file=str(path)) for api in (original, aimet))
    theirs.export(str(tmp_path), "net", dummy_input=images(model))
    expected, got = json.loads((tmp_path / "net_torch.encodings").read_text()), mine.module_encodings()
    for table in ("activation_encodings", "param_encodings"):
        assert not list(differences(got[table], expected[table]))
    with torch.no_grad():
        x = images(model, seed=1)
        assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-4)
    assert qkernels.verify(mine.prepared(), mine.convert(), [x]).total_mismatches == 0


PARAMS = {
    "bias": {"params": {"bias": {"is_quantized": "True"}}},
    "affine bias": {"params": {"bias": {"is_quantized": "True", "is_symmetric": "False"}}},
    "unmentioned bias": {},
    "no bias": {"params": {"bias": {"is_quantized": "False"}}},
    "float weights": {"params": {"weight": {"is_quantized": "False"}, "bias": {"is_quantized": "False"}}},
    "affine weights of one type": {
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {"Gemm": {"params": {"weight": {"is_symmetric": "False"}}}},
    },
    "bias of one type": {
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {"Gemm": {"params": {"bias": {"is_quantized": "True"}}}},
    },
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("bits", [8, 12])
def test_biases_and_wide_outputs_are_those_of_aimet(original, tmp_path, name, per_channel, bits):
    if name == "affine bias" and per_channel:
        pytest.skip("a grid for each number of a bias, which AIMET finds by another search")
    config = {
        "defaults": {
            "ops": {"is_output_quantized": "True"},
            "params": {"is_quantized": "True", "is_symmetric": "True"},
            "per_channel_quantization": str(per_channel),
        },
        "params": {},
        "op_type": {},
        "supergroups": DEFAULT["supergroups"],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    } | PARAMS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    theirs, mine = (
        calibrated(Everything, api, config_file=str(path), default_output_bw=bits) for api in (original, aimet)
    )
    theirs.export(str(tmp_path), "net", dummy_input=images(Everything))
    expected, got = json.loads((tmp_path / "net_torch.encodings").read_text()), mine.module_encodings()
    for table in ("activation_encodings", "param_encodings"):
        assert not list(differences(got[table], expected[table]))
    with torch.no_grad():
        for seed in range(3):
            x = images(Everything, seed=seed)
            outputs = mine.model(x), theirs.model(x).as_subclass(torch.Tensor), mine.convert()(x)
            assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
            assert torch.allclose(outputs[2], outputs[1], atol=1e-4)


def test_aimet_takes_weights_of_16_bits_for_rounded_ones(original):
    """And so gives them a grid several times wider than they are; the outputs are close all the same."""
    theirs, mine = (calibrated(Everything, api, default_param_bw=16, default_output_bw=16) for api in (original, aimet))
    weight = mine.model.fc1.weight.abs().amax(1)
    assert torch.allclose(mine.model.fc1.param_quantizers["weight"].get_max().flatten(), weight, rtol=1e-3)
    wide = theirs.model.fc1.param_quantizers["weight"].get_max().flatten().as_subclass(torch.Tensor)
    assert (wide > 2 * weight).any()
    with torch.no_grad():
        x = images(Everything)
        assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-3)


@pytest.mark.parametrize(
    ("model", "bits", "optimizer", "codes"),
    [
        (Network, 4, torch.optim.SGD, 0),
        (Network, 8, torch.optim.SGD, 1),
        (Everything, 4, torch.optim.SGD, 0),
        (Everything, 8, torch.optim.SGD, 0),
        (Everything, 4, torch.optim.Adam, 0),
        (Everything, 8, torch.optim.Adam, 0),
    ],
)
def test_training_steps_are_those_of_aimet(original, model, bits, optimizer, codes):
    """Weights and ranges after eight steps, and the logits: up to one code where the last bit of a range decides.

    A range is float32 in AIMET, and float64 here.
    """
    trained, logits, losses = [], [], []
    for api in (aimet, original):
        sim = calibrated(model, api, default_param_bw=bits)
        step_of = optimizer(sim.model.parameters(), lr=1e-2 if optimizer is torch.optim.SGD else 1e-4)
        losses.append([])
        for step in range(8):
            y = sim.model(images(model, seed=step))
            loss = F.cross_entropy(y, torch.arange(8))
            loss.backward()
            step_of.step()
            step_of.zero_grad()
            losses[-1].append(loss.item())
        trained.append(
            {n: p.detach().flatten().float().as_subclass(torch.Tensor) for n, p in sim.model.named_parameters()}
        )
        with torch.no_grad():
            logits.append(sim.model.eval()(images(model, seed=99)).as_subclass(torch.Tensor))
    mine, theirs = trained
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-5), name
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.allclose(*logits, rtol=0, atol=1e-4 + codes * logits[1].max().item() / 255)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.002, 1.0), (-0.5, 1.0), (0.01, 1.0), (-1.0, 0.0)])
def test_gradients_of_a_range_are_those_of_aimet(original, ends):
    """Also where the zero point is the first or last code, and stays there."""
    from aimet_torch.v2.quantization.affine import QuantizeDequantize

    x = torch.tensor([-0.7, 0.0, 0.3, 0.9, 1.2, 1.5])
    theirs, mine = QuantizeDequantize((), 8, symmetric=False), aimet.quantizers.QuantizeDequantize((1,), 8)
    theirs.set_range(*ends)
    mine.set_range(*ends)
    for quantizer in (theirs, mine):
        quantizer(x).as_subclass(torch.Tensor).sum().backward()
    assert mine.min.grad.item() == pytest.approx(theirs.min.grad.item(), rel=1e-4)
    assert mine.max.grad.item() == pytest.approx(theirs.max.grad.item(), rel=1e-4)


class Moved(nn.Module):
    """A layer behind a model input that a function moved, and layers that are called again."""

    def __init__(self, move):
        super().__init__()
        self.move, self.first, self.again = move, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.again(torch.relu(self.again(torch.relu(self.first(self.move(x))))))


MOVES = {
    "view": lambda x: x.view(x.size(0), -1, 8),
    "flatten": lambda x: torch.flatten(x, 1, 2),
    "slice": lambda x: x[:, :, 1:],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "permute": lambda x: x.permute(0, 2, 1, 3).contiguous(),
    "cast": lambda x: x.double().float().clone(),
    "identity": nn.Identity(),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "flip": lambda x: x.flip(2),
}


@pytest.mark.parametrize("name", MOVES)
def test_moved_inputs_and_repeated_layers_have_the_quantizers_of_aimet(original, tmp_path, name):
    x, sims = torch.rand(4, 2, 3, 8) - 0.3, []
    for api in (aimet, original):
        torch.manual_seed(0)
        model = api.model_preparer.prepare_model(Moved(MOVES[name]).eval())
        sims.append(api.quantsim.QuantizationSimModel(model, dummy_input=x))
        sims[-1].compute_encodings(lambda m: m(x))
    mine, theirs = sims
    assert {n for n, _ in mine.named_quantizers()} == {n for n, _ in theirs.named_quantizers()}
    assert (mine.model.first.input_quantizers[0] is None) == (name in ("repeat", "flip"))
    theirs.export(str(tmp_path), "net", dummy_input=x)
    mine.load_encodings(tmp_path / "net_torch.encodings", partial=False)
    assert torch.allclose(mine.model(x), theirs.model(x).as_subclass(torch.Tensor), atol=1e-5)


def test_functions_of_an_unprepared_model_leave_its_input_unrounded_as_in_aimet(original):
    for move in (lambda x: x / 255.0, lambda x: x.mean(1, keepdim=True), lambda x: x - 1.0):
        found = []
        for api in (aimet, original):
            sim = api.quantsim.QuantizationSimModel(Moved(move).eval(), dummy_input=torch.rand(4, 2, 3, 8))
            found.append(sim.model.first.input_quantizers[0] is not None)
        assert found[0] == found[1]
