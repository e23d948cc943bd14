"""Recipe int8-dynamic: linear layers that quantize their input when it arrives, without calibration."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import qkernels
from qkernels import reference
from qkernels.core.qspec import QSpec
from qkernels.core.recipe import RECIPES, Match, Override, Recipe, TensorRecipe, make_recipe
from qkernels.errors import InvalidArgument, InvalidType, Unsupported

DYNAMIC = RECIPES["int8-dynamic"].activation


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16, bias=False)).eval()


def converted(model: nn.Module, x, recipe="int8-dynamic", **options) -> tuple[nn.Module, nn.Module]:
    prepared = qkernels.prepare(model, x, recipe, **options)
    return prepared, qkernels.convert(prepared)


def layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, qkernels.nn.QDynamicLinear)]


def test_what_is_evaluated_is_what_is_shipped(isa):
    x = torch.randn(5, 7, 32)
    prepared, model = converted(mlp(), x)
    assert layers(model) == ["0", "3"]
    batches = [x, 100 * x, torch.randn(1, 32), torch.zeros(3, 32), torch.randn(2, 3, 4, 32)]
    assert qkernels.verify(prepared, model, batches).total_mismatches == 0
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"symmetric_activations": True}, {"weight_granularity": "per_tensor"}, {"bits": 4}]
)
def test_options_of_the_recipe_apply(options):
    x = torch.randn(5, 32)
    prepared, model = converted(mlp(), x, **options)
    assert qkernels.verify(prepared, model, [x]).total_mismatches == 0


def test_int8_activations_and_weights_with_zero_points():
    activation = replace(DYNAMIC, spec=QSpec.activation(dtype=torch.int8))
    weight = TensorRecipe(replace(QSpec.weight(), symmetric=False, qmin=-128, qmax=127))
    x = torch.randn(5, 32)
    prepared, model = converted(mlp(), x, Recipe(activation, weight))
    assert bool(model.get_submodule("0").weight_zero_point.any())
    assert qkernels.verify(prepared, model, [x]).total_mismatches == 0


def test_a_row_of_any_magnitude_keeps_its_accuracy():
    """What a calibrated grid cannot do: it was made for one magnitude."""
    model, x = mlp()[:1], torch.randn(64, 32)
    _, dynamic = converted(model, x)
    for factor in (1e-4, 1.0, 1e4):
        error = (dynamic(factor * x) - model[0].bias) / factor - (model(factor * x) - model[0].bias) / factor
        assert error.abs().max() < 0.02


def test_transformers_convert_without_calibration():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(2, 9, 32)
    prepared, q = converted(model.eval(), x)
    assert len(layers(q)) >= 2 * 4
    assert qkernels.verify(prepared, q, [x, torch.randn(3, 4, 32)]).total_mismatches == 0
    assert (q(x) - model(x)).abs().max() < 0.1


def test_a_recipe_mixes_calibrated_and_dynamic_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).eval()
    x = torch.randn(4, 3, 8, 8)
    recipe = replace(RECIPES["int8"], overrides=(Override(Match.of(nn.Linear), activation=DYNAMIC),))
    prepared = qkernels.prepare(model, x, recipe)
    qkernels.calibrate(prepared, [x])
    q = qkernels.convert(prepared)
    assert layers(q) == ["3"]
    assert isinstance(q.get_submodule("0"), qkernels.nn.QConv)
    assert qkernels.verify(prepared, q, [x]).total_mismatches == 0


def test_all_else_stays_float_and_the_report_says_so():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 2)).eval()
    prepared, q = converted(model, torch.randn(2, 3, 8), skip=["3"])
    assert layers(q) == ["2"]
    assert type(q.get_submodule("0")) is nn.Conv1d
    rows = {row.name: row for row in prepared.report}
    assert rows["2"].integer
    assert "only linear layers" in rows["0"].reason
    assert rows["3"].reason == "skipped by the recipe"


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    x = torch.randn(5, 32)
    _, model = converted(mlp(), x)
    qkernels.save(model, tmp_path / "model.qk")
    assert torch.equal(qkernels.load(tmp_path / "model.qk")(x), model(x))


def test_compiled_exported_and_planned_it_gives_the_same_bits():
    x = torch.randn(5, 32)
    _, model = converted(mlp(), x)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    with pytest.warns(UserWarning, match="no integer step"):
        assert torch.equal(qkernels.compile(model, x)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input(dtype):
    _, model = converted(mlp()[:1], torch.randn(5, 32))
    x = torch.randn(5, 32).to(dtype)
    layer = model.get_submodule("0")
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer.reference_forward(x))
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_rows_with_nan_do_not_disturb_others():
    _, model = converted(mlp()[:1], torch.randn(5, 32))
    x = torch.randn(5, 32)
    expected = model(x)
    x[2, 3] = float("nan")
    y = model(x)
    assert torch.isnan(y[2]).all()
    keep = torch.tensor([0, 1, 3, 4])
    assert torch.equal(y[keep], expected[keep])


def test_the_recipe_is_a_value():
    recipe = RECIPES["int8-dynamic"]
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe != RECIPES["int8-minmax"]


def test_what_has_no_meaning_is_refused():
    with pytest.raises(InvalidArgument, match="no observer"):
        make_recipe("int8-dynamic", observer="minmax")
    with pytest.raises(InvalidArgument, match="corrections come from calibration"):
        make_recipe("int8-dynamic", corrections="bias")
    with pytest.raises(InvalidArgument, match="not trained"):
        qkernels.prepare_qat(mlp(), torch.randn(5, 32), recipe="int8-dynamic")
    with pytest.raises(Unsupported, match="not trained"):
        qkernels.prepare_qat(mlp(), torch.randn(5, 32), recipe=RECIPES["int8-dynamic"])
    _, model = converted(mlp()[:1], torch.randn(5, 32))
    with pytest.raises(InvalidType, match=r"QDynamicLinear '0': input must be a float tensor, got torch\.uint8"):
        model.get_submodule("0")(torch.zeros(5, 32, dtype=torch.uint8))
    with pytest.raises(Unsupported, match=r"use torch\.compile or torch\.export"):
        torch.jit.script(model)


def test_the_layer_is_the_reference():
    layer = converted(mlp()[:1], torch.randn(5, 32))[1].get_submodule("0")
    x = torch.randn(5, 32)
    codes, scale, zero_point = reference.quantize_rows(x, 0, 255, False, torch.uint8)
    weight = layer.weight, layer.weight_scale, None, layer.bias
    assert torch.equal(layer(x), reference.linear_rows(codes, scale, zero_point, *weight, torch.float32))
