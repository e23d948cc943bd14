"""One recipe in the words of NNI, torch.ao, AIMET and of our own: one Recipe, one integer network, one set of grids."""

import functools
import itertools
import json

import pytest
import torch
from torch import nn

import qkernels
import qkernels.frontends.aimet as aimet
import qkernels.frontends.nni as nni
from qkernels.core.grids import Grid, from_json, prepare_grids, to_json
from qkernels.core.recipe import Recipe, TensorRecipe, make_recipe
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends import torch_ao

EPS = torch.finfo(torch.float32).eps
STRICT = {
    "defaults": {
        "ops": {"is_output_quantized": True},
        "params": {"is_quantized": True, "is_symmetric": True},
        "strict_symmetric": True,
        "per_channel_quantization": True,
    },
    "params": {"bias": {"is_quantized": False}},
    "supergroups": [{"op_list": ["Conv", "Relu"]}],
    "model_input": {"is_input_quantized": True},
    "model_output": {"is_output_quantized": False},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()
        self.fc = nn.Linear(16 * 6 * 6, 10)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(x.flatten(1))


def network():
    """Its weights are on their grids already: AIMET watches activations behind rounded weights, others do not."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.conv1, model.conv2, model.fc):
            largest = layer.weight.abs().amax(list(range(1, layer.weight.dim())), keepdim=True)
            layer.weight.copy_(torch.round(layer.weight / largest * 127) / 1024)
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(3)]


def own():
    weight = qkernels.QSpec(torch.int8, -127, 127, symmetric=True, per_channel=True, min_scale=EPS)
    recipe = Recipe(TensorRecipe(qkernels.QSpec(torch.uint8, 0, 255, min_scale=EPS)), TensorRecipe(weight))
    prepared = qkernels.prepare(network(), batches()[0], recipe)
    qkernels.calibrate(prepared, batches())
    return recipe, qkernels.convert(prepared)


def in_nni():
    weight = {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "out_channel"}
    settings = {"quant_dtype": "uint8", "quant_scheme": "affine"}
    config_list = [
        {
            "op_names": ["conv1"],
            **settings,
            "target_names": ["_input_", "weight"],
            "target_settings": {"weight": weight},
        },
        {"op_names": ["conv2", "fc"], **settings, "target_names": ["weight"], "target_settings": {"weight": weight}},
        {"op_types": ["ReLU"], **settings, "target_names": ["_output_"]},
    ]
    model = network()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    evaluator = nni.TorchEvaluator(None, optimizer, None, evaluating_func=lambda model: [model(x) for x in batches()])
    quantizer = nni.PtqQuantizer(model, config_list, evaluator)
    quantizer.track_forward(batches()[0])
    quantizer.compress(None, 1)
    return quantizer


def in_torch_fx():
    activation = torch_ao.MinMaxObserver.with_args(eps=EPS)
    weight = torch_ao.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127, eps=EPS
    )
    mapping = torch_ao.QConfigMapping().set_global(torch_ao.QConfig(activation, weight))
    prepared = torch_ao.prepare_fx(network(), mapping, batches()[0])
    for x in batches():
        prepared(x)
    return torch_ao.mapping_recipe(mapping), torch_ao.convert_fx(prepared)


def in_torch_eager():
    """As a user writes it; the output of the last layer gets a grid there."""
    model = torch_ao.QuantWrapper(network())
    torch_ao.fuse_modules(model.module, [["conv1", "relu1"], ["conv2", "relu2"]], inplace=True)
    weight = torch_ao.per_channel_weight_observer_range_neg_127_to_127.with_args(eps=EPS)
    model.qconfig = torch_ao.QConfig(torch_ao.MinMaxObserver, weight)
    torch_ao.prepare(model, inplace=True)
    with torch.no_grad():
        for x in batches():
            model(x)
    return model


def in_aimet():
    model = aimet.model_preparer.prepare_model(network())
    sim = aimet.quantsim.QuantizationSimModel(model, batches()[0], config_file=STRICT)
    sim.compute_encodings(lambda model: [model(x) for x in batches()])
    return sim


def test_the_same_recipe_in_every_dialect():
    recipe, _ = own()
    assert torch_ao.mapping_recipe(torch_ao.QConfigMapping().set_global(in_torch_eager().qconfig)) == recipe
    assert in_torch_fx()[0] == recipe
    assert in_aimet().recipe == make_recipe(recipe, rule="range")  # AIMET trains the ends of ranges
    found = in_nni().recipe  # its entries name modules, and so does the recipe
    assert {found.for_module(path).weight for path in ("conv1", "conv2", "fc")} == {recipe.weight}
    assert {found.for_module(path).activation for path in ("conv1",)} == {recipe.activation}
    assert Recipe.from_json(recipe.to_json()) == recipe


def state(converted):
    """Codes of weights, biases and grids, by layer."""
    return {name: tensor for name, tensor in converted.state_dict().items() if tensor is not None}


def test_the_same_integer_network_in_every_dialect():
    _, expected = own()
    others = {"nni": in_nni().convert(), "torch": in_torch_fx()[1], "aimet": in_aimet().convert()}
    x = torch.cat(batches())
    for name, converted in others.items():
        assert torch.equal(converted(x), expected(x)), name
        found, wanted = state(converted), state(expected)
        assert [t.shape for t in found.values()] == [t.shape for t in wanted.values()], name
        for mine, theirs in zip(found.values(), wanted.values(), strict=True):
            assert torch.equal(mine, theirs), name
    eager = torch_ao.convert(in_torch_eager())
    for path in ("conv1", "conv2"):
        layer = next(m for n, m in eager.named_modules() if n.startswith(f"module.{path}") and hasattr(m, "kind"))
        wanted = expected.get_submodule(path)
        for name, buffer in wanted.named_buffers():
            assert torch.equal(dict(layer.named_buffers())[name], buffer), (path, name)


# ---- grids -----------------------------------------------------------------------------------------------------------


def tensor_name(path, key):
    return f"/{path}/Op_{'output_0' if key == 'output' else key.replace('input', 'input_')}"


def through_file(encodings):
    return json.loads(json.dumps(encodings))


# name: grids -> that dialect's own form -> grids
FORMS = {
    "json": lambda grids: from_json(to_json(grids)),
    "nni": lambda grids: nni.calibration.read(nni.calibration.write(grids, network())),
    "torch": lambda grids: torch_ao.qparams.read(torch_ao.qparams.write(grids)),
    "aimet 0.6.1": lambda grids: read_aimet(aimet.encodings.write(grids, "0.6.1", tensor_name)),
    "aimet 1.0.0": lambda grids: read_aimet(aimet.encodings.write(grids, "1.0.0", tensor_name)),
    "aimet by module": lambda grids: read_aimet(aimet.encodings.write_by_module(grids)),
}


def read_aimet(encodings):
    return aimet.encodings.read(through_file(encodings), dict(network().named_modules()))


@functools.cache
def found_grids():
    return in_aimet().grids()


def ordered(grids):
    return {path: dict(sorted(table.items())) for path, table in sorted(grids.items())}


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMS, 2)))
def test_grids_go_from_each_form_to_each_other_and_back_to_the_bit(first, second):
    grids = found_grids()
    assert set(grids) == {"conv1", "relu1", "conv2", "relu2", "fc"}
    assert ordered(FORMS[first](FORMS[second](FORMS[first](grids)))) == ordered(grids)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "grid",
    [
        Grid([0.1], [-128], 256),
        Grid([0.3], [-3], 255),
        Grid([1 / 3], [0], 16),
        Grid([0.1], [-128], 256, symmetric=True),
        Grid([0.1], [-127], 255, symmetric=True),
        Grid([0.1], [-8], 16, symmetric=True),
        Grid([0.1], [-1], 3, symmetric=True),
    ],
)
def test_every_kind_of_grid_goes_through_every_form(form, grid):
    grids = {"relu1": {"output": grid}, "conv1": {"weight": Grid(grid.scale * 8, grid.offset * 8, *rest(grid), True)}}
    if form == "aimet 1.0.0" and grid.is_even and not grid.symmetric:
        with pytest.raises(qkernels.errors.Unsupported, match=r"0\.6\.1"):
            FORMS[form](grids)
    else:
        assert ordered(FORMS[form](grids)) == ordered(grids)


def rest(grid):
    return grid.codes, grid.symmetric


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid((0.0,), (-128,), 256), "conv1.weight: scale must be positive, finite and normal, got 0.0"),
        (Grid((float("inf"),), (-128,), 256), "got inf"),
        (Grid((0.1,), (-256,), 256), "zero must be one of the 256 codes, got code 256"),
        (Grid((0.1, 0.2), (-128,), 256, per_channel=True), "2 scales and 1 offsets or zero points"),
    ],
)
def test_a_table_whose_numbers_are_no_grid_is_refused_with_its_place(grid, message):
    with pytest.raises(InvalidArgument, match=message):
        from_json(to_json({"conv1": {"weight": grid}}))


def test_tables_of_every_dialect_say_where_a_number_is_wrong():
    grids = {"conv1": {"weight": Grid((0.1,), (-128,), 256, symmetric=True)}}
    table = torch_ao.qparams.write(grids)
    table["conv1"]["weight"]["scale"] = torch.tensor([-1.0])
    with pytest.raises(InvalidArgument, match=r"conv1\.weight: scale must be positive"):
        torch_ao.qparams.read(table)
    del table["conv1"]["weight"]["quant_min"]
    with pytest.raises(InvalidArgument, match=r"conv1\.weight\.quant_min: missing; there are"):
        torch_ao.qparams.read(table)
    config = nni.calibration.write(grids, network())
    config["conv1"]["weight"]["zero_point"] = torch.tensor(300.0)
    with pytest.raises(InvalidArgument, match=r"calibration_config\.conv1\.weight: zero must be one of the 256 codes"):
        nni.calibration.read(config)
    with pytest.raises(InvalidArgument, match=r"no module 'conv9'; did you mean 'conv\d'"):
        prepare_grids(network(), batches()[0], {"conv9": grids["conv1"]})


def test_forms_without_blocks_refuse_them():
    grids = {"conv1": {"weight": Grid((0.5, 0.25), (0, 0), 15, True, True, (2, 1, 1, 1))}}
    assert from_json(to_json(grids)) == grids
    with pytest.raises(Unsupported, match=r"\[2, 1, 1, 1\] blocks; use to_json"):
        torch_ao.qparams.write(grids)
    for version in ("0.6.1", "1.0.0"):
        with pytest.raises(Unsupported, match=r"encodings.*\[2, 1, 1, 1\] blocks; use to_json"):
            aimet.encodings.write(grids, version, lambda path, key: path)


def test_encodings_are_not_written_for_a_grid_that_they_do_not_hold():
    grids = {"conv1": {"output": Grid((0.1,), (-100,), 201, symmetric=False)}}
    assert torch_ao.qparams.read(torch_ao.qparams.write(grids)) == grids
    with pytest.raises(Unsupported, match="no bitwidth has 201 codes"):
        aimet.encodings.write(grids, "0.6.1", tensor_name)


def test_dialects_find_the_same_grids():
    grids = in_aimet().grids()
    assert ordered(nni.calibration.read(in_nni().get_calibration_config())) == ordered(grids)
    eager = torch_ao.qparams.of_model(in_torch_eager())
    assert eager["quant"]["output"] == grids["conv1"]["input0"]
    assert eager["module.conv1"]["output"] == grids["relu1"]["output"]
    assert eager["module.conv1.0"]["weight"].scale == grids["conv1"]["weight"].scale  # torch clamps to the whole dtype


@pytest.mark.parametrize("form", FORMS)
def test_grids_of_any_form_run_on_a_float_model(form):
    converted = qkernels.convert(prepare_grids(network(), batches()[0], FORMS[form](in_nni_grids())))
    x = torch.cat(batches())
    assert torch.equal(converted(x), in_nni().convert()(x))


def in_nni_grids():
    return nni.calibration.read(in_nni().get_calibration_config())


def test_written_forms_go_into_the_original_verbs():
    quantizer, sim, x = in_nni(), in_aimet(), torch.cat(batches())
    expected = quantizer.convert()(x)
    config = nni.calibration.write(sim.grids(), network())
    for table in config.values():
        for entry in table.values():
            entry["scale"] = entry["scale"] * 2  # so that something changes
    quantizer.update_calibration_config(config)
    assert not torch.equal(quantizer.convert()(x), expected)
    sim.load_encodings(aimet.encodings.write_by_module(nni.calibration.read(config)), partial=False)
    assert torch.equal(quantizer.convert()(x), sim.convert()(x))
    options = torch_ao.qparams.write(sim.grids())["relu1"]["output"]
    theirs = torch.ao.quantization.FixedQParamsObserver(**options)
    assert torch.equal(theirs.calculate_qparams()[0].reshape(-1), options["scale"])


def test_torchs_observers_lead_to_the_same_grids():
    ao = torch.ao.quantization
    model = nn.Sequential(ao.QuantStub(), network().conv1, nn.ReLU(), ao.DeQuantStub()).eval()
    model.qconfig = ao.QConfig(ao.MinMaxObserver, ao.default_per_channel_weight_observer)
    prepared = ao.prepare(ao.fuse_modules(model, ["1", "2"]))
    for x in batches():
        prepared(x)
    grids = torch_ao.qparams.of_model(prepared)
    scale, zero_point = prepared[0].activation_post_process.calculate_qparams()
    options = torch_ao.qparams.write(grids)
    assert torch.equal(options["0"]["output"]["scale"], scale)
    assert torch.equal(options["0"]["output"]["zero_point"], zero_point)
    weight, observer = model[1].weight.detach(), ao.default_per_channel_weight_observer()
    observer(weight)
    found = options["1.0"]["weight"]
    assert torch.equal(found["scale"], observer.calculate_qparams()[0])
    theirs = torch.quantize_per_channel(weight, found["scale"], found["zero_point"], 0, found["dtype"])
    assert torch.equal(theirs.int_repr(), grids["1.0"]["weight"].qparams(True).quantize(weight))
