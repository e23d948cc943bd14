"""prepare: what becomes integer, where grids are chosen, what stays float and why."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core.layers import Prepared
from qkernels.core.placement import QUANTIZERS
from qkernels.core.prepare import PreparedModel
from qkernels.core.quantizer import Quantizer, State
from qkernels.errors import InvalidArgument, InvalidState, InvalidType


def randomized(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return model.eval()


def grids(prepared) -> list[str]:
    """The owners of activation Quantizers."""
    return [name for name, _ in getattr(prepared, QUANTIZERS).named_children()]


def kinds_of(prepared) -> list[str]:
    return [row.kind for row in prepared.report.integer]


def model_of(forward, **modules) -> nn.Module:
    """A module with these submodules (or parameters) and this forward."""

    class Model(nn.Module):
        pass

    Model.forward = forward
    model = Model()
    for name, module in modules.items():
        setattr(model, name, module)
    return randomized(model)


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def check_same(model, prepared, *inputs):
    with torch.no_grad():
        expected, got = model(*inputs), prepared(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_prepare_leaves_the_model_alone():
    model = randomized(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)))
    before, hook_state = copy.deepcopy(model.state_dict()), str(model)
    prepared = qkernels.prepare(model, IMAGE)
    assert str(model) == hook_state
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    check_same(model, prepared, IMAGE)
    assert isinstance(prepared, PreparedModel)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3, groups=2), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_batch_norm_is_folded_into_every_kind_of_layer(layer, norm, shape):
    model = randomized(nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)))
    x = torch.randn(shape)
    model(x)
    prepared = qkernels.prepare(model, x)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for m in prepared.modules())
    check_same(model, prepared, torch.randn(5, *shape[1:]))


def test_folding_is_exact_to_one_rounding():
    conv, norm = nn.Conv2d(3, 5, 3).double(), nn.BatchNorm2d(5).double()
    model = randomized(nn.Sequential(conv, norm))
    prepared = qkernels.prepare(copy.deepcopy(model).float(), torch.randn(1, 3, 8, 8))
    scale = norm.weight.float().double() / torch.sqrt(norm.running_var.float().double() + norm.eps)
    expected = (conv.weight.float().double() * scale.reshape(-1, 1, 1, 1)).float()
    assert torch.equal(prepared.get_submodule("0").weight, expected)


def test_a_batch_norm_with_nothing_before_it_becomes_a_convolution():
    model = model_of(lambda self, x: self.conv(F.relu(self.bn(x))), bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    prepared = qkernels.prepare(model, IMAGE)
    assert kinds_of(prepared) == ["conv", "relu", "conv"]
    check_same(model, prepared, IMAGE)


def test_grids_of_a_residual_block():
    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.fc(self.relu(y).mean((2, 3)))

    model = model_of(
        forward,
        conv1=nn.Conv2d(4, 4, 3, padding=1),
        bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1),
        bn2=nn.BatchNorm2d(4),
        relu=nn.ReLU(inplace=True),
        fc=nn.Linear(4, 3),
    )
    prepared = qkernels.prepare(model, IMAGE)
    # one for the input, one after conv1+relu, conv2, add+relu, mean; none for the logits
    assert grids(prepared) == ["x", "relu", "conv2", "relu_1", "mean"]
    assert not prepared.report.stayed_float
    check_same(model, prepared, IMAGE)


def test_operations_that_keep_values_share_the_grid_of_their_input():
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.interpolate(x, scale_factor=2.0)
        a, b = x.permute(0, 1, 3, 2).chunk(2, dim=1)
        return self.fc(a.reshape(a.size(0), -1)) + self.fc(torch.flatten(b, 1))

    model = model_of(forward, conv=nn.Conv2d(4, 4, 3, padding=1), fc=nn.Linear(128, 3))
    prepared = qkernels.prepare(model, IMAGE)
    assert grids(prepared) == ["x", "relu", "fc", "fc_1", "add"]
    check_same(model, prepared, torch.randn(7, 4, 8, 8))


def test_operands_of_cat_share_one_grid():
    def forward(self, x):
        a, b = F.relu(self.conv1(x)), self.conv2(x)
        y = torch.cat([F.max_pool2d(a, 2), F.max_pool2d(b, 2)], 1)
        z = torch.cat([y, F.max_pool2d(x, 2)], dim=1)
        return self.conv3(z)

    convs = {"conv1": nn.Conv2d(4, 4, 1), "conv2": nn.Conv2d(4, 4, 1), "conv3": nn.Conv2d(12, 2, 1)}
    model = model_of(forward, **convs)
    prepared = qkernels.prepare(model, IMAGE)
    calls = [n.target for n in prepared.graph.nodes if n.op == "call_module" and n.target.startswith(QUANTIZERS)]
    assert calls.count(f"{QUANTIZERS}.cat_1") == 3  # relu, conv2, and x after its pool
    assert calls.count(f"{QUANTIZERS}.x") == 1
    check_same(model, prepared, IMAGE)


def test_float_operations_are_islands_with_a_reason():
    def forward(self, x):
        x = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return torch.softmax(self.fc(x), dim=-1)

    model = model_of(forward, conv=nn.Conv2d(4, 6, 3), norm=nn.LayerNorm(6), fc=nn.Linear(6, 3))
    prepared = qkernels.prepare(model, IMAGE)
    assert kinds_of(prepared) == ["conv", "linear"]
    stayed = {row.name: row.reason for row in prepared.report.stayed_float}
    assert stayed["norm"] == "no integer layer for LayerNorm"
    assert stayed["softmax"] == "no integer layer for softmax"
    assert "softmax" in str(prepared.report)
    assert grids(prepared) == ["x", "norm"]  # conv and fc store float for the float operation after them
    check_same(model, prepared, IMAGE)


def test_what_only_feeds_float_readers_is_left_float():
    model = model_of(lambda self, x: torch.sigmoid(self.conv(x)), conv=nn.Conv2d(4, 1, 1))
    prepared = qkernels.prepare(model, IMAGE)
    assert kinds_of(prepared) == ["conv"]
    assert prepared.report.stayed_float[0].reason == "only float operations read it"


def test_skipping_by_path_type_and_regex():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Flatten(), nn.Linear(256, 2)
    )
    for skip, expected in [
        (["0"], ["conv", "relu", "linear"]),
        (["1"], ["conv", "linear"]),
        ([nn.Conv2d], ["linear"]),
        ([re.compile(r"\d")], ["conv"]),
    ]:
        prepared = qkernels.prepare(model.eval(), IMAGE, skip=skip)
        assert kinds_of(prepared) == expected
        assert any("skipped" in row.reason for row in prepared.report.stayed_float)
        assert all(row.reason for row in prepared.report.stayed_float)
        check_same(model, prepared, IMAGE)


def test_functional_weights_become_layers():
    def forward(self, x):
        x = F.conv2d(x, self.kernel, self.bias, stride=2, padding=1)
        x = F.batch_norm(x, self.mean, self.var, training=False)
        return F.linear(x.flatten(1), self.matrix)

    model = model_of(
        forward,
        kernel=nn.Parameter(torch.randn(6, 4, 3, 3)),
        bias=nn.Parameter(torch.randn(6)),
        matrix=nn.Parameter(torch.randn(3, 96)),
    )
    model.register_buffer("mean", torch.randn(6))
    model.register_buffer("var", torch.rand(6) + 0.5)
    prepared = qkernels.prepare(model, IMAGE)
    assert kinds_of(prepared) == ["conv", "linear"]
    check_same(model, prepared, IMAGE)


def test_parametrized_weights_and_keyword_calls():
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    model = model_of(lambda self, x: self.fc(input=self.conv(x).flatten(1)), conv=conv, fc=nn.Linear(256, 2))
    prepared = qkernels.prepare(model, IMAGE)
    assert kinds_of(prepared) == ["conv", "linear"]
    assert torch.nn.utils.parametrize.is_parametrized(model.conv)
    check_same(model, prepared, IMAGE)


def _pruned(conv):
    return torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5)


@pytest.mark.parametrize("formula", [_pruned, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_computed_by_hooks(formula):
    model = model_of(lambda self, x: self.conv(x), conv=formula(nn.Conv2d(4, 4, 1)))
    with torch.no_grad():
        model(IMAGE)
    prepared = qkernels.prepare(model, IMAGE)
    assert kinds_of(prepared) == ["conv"]
    assert len(model.conv._forward_pre_hooks) == 1
    check_same(model, prepared, IMAGE)


def test_training_a_pruned_model_warns_that_the_mask_is_gone():
    with pytest.warns(UserWarning, match="masks of torch.nn.utils.prune are applied once"):
        qkernels.prepare_qat(_pruned(nn.Linear(4, 4)), torch.randn(2, 4))


def test_torchscript_is_refused():
    with pytest.raises(TypeError, match="TorchScript"):
        qkernels.prepare(torch.jit.script(nn.Linear(4, 4)), torch.randn(2, 4))


def test_a_leaf_with_other_outputs_is_reported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(4, 2, add_zero_attn=True), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    prepared = qkernels.prepare(Model().eval(), torch.randn(2, 3, 4))
    assert [(row.name, row.reason) for row in prepared.report.stayed_float] == [
        ("attention", "no integer layer for MultiheadAttention")
    ]
    assert kinds_of(prepared) == ["linear"]


def test_arithmetic_with_numbers_is_a_table():
    def forward(self, x):
        x = (1.0 - self.conv(x)) * 2 / 3 - 0.5
        return self.last(-x + 2.0 * x**2)

    model = model_of(forward, conv=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 2, 1))
    prepared = qkernels.prepare(model, IMAGE)
    assert not prepared.report.stayed_float
    check_same(model, prepared, IMAGE)


def test_a_computed_weight_stays_float():
    model = model_of(lambda self, x: F.linear(x, self.w * 2.0), w=nn.Parameter(torch.randn(3, 5)))
    x = torch.randn(2, 5)
    with pytest.warns(UserWarning, match="stays float"):
        prepared = qkernels.prepare(model, x)
    assert not prepared.report.integer
    check_same(model, prepared, x)


def test_a_module_called_twice_gets_a_grid_for_each_call_and_keeps_one_parameter():
    def forward(self, x):
        return self.last(F.relu(self.conv(F.relu(self.conv(x)))))

    model = model_of(forward, conv=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 4, 1))
    prepared = qkernels.prepare(model, IMAGE)
    layers = [m for m in prepared.modules() if isinstance(m, Prepared)]
    assert len(layers) == 3
    assert layers[0].weight is layers[1].weight
    assert grids(prepared) == ["x", "relu", "relu_1"]
    check_same(model, prepared, IMAGE)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prepared = qkernels.prepare(model.eval(), torch.randn(2, 4))
    assert prepared.get_submodule("0").weight is prepared.get_submodule("2").weight


def test_several_inputs_and_nested_outputs():
    def forward(self, x, y, scale=None):
        z = self.a(x) + self.b(y)
        return {"sum": z, "parts": (self.c(z), x.shape[0])}

    model = model_of(forward, a=nn.Linear(4, 5), b=nn.Linear(3, 5), c=nn.Linear(5, 2))
    x, y = torch.randn(2, 4), torch.randn(2, 3)
    for example in [(x, y), {"x": x, "y": y}]:
        prepared = qkernels.prepare(model, example)
        got = prepared(x, y=y)
        torch.testing.assert_close(got["sum"], model(x, y)["sum"])
        assert got["parts"][1] == 2
    with pytest.raises(TypeError):
        prepared(x, y, torch.ones(1))  # not in the example: fixed at its default


def test_constants_of_the_example_are_checked():
    def forward(self, x, mode):
        return self.a(x) if mode == 0 else x

    model = model_of(forward, a=nn.Linear(4, 4))
    prepared = qkernels.prepare(model, (torch.randn(2, 4), 0))
    prepared(torch.randn(3, 4), 0)
    with pytest.raises(AssertionError, match="mode"):
        prepared(torch.randn(3, 4), 1)


def test_in_place_operations_keep_their_meaning():
    def forward(self, x):
        y = self.conv(x)
        F.relu_(y)
        return self.last(y)

    model = model_of(forward, conv=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 4, 1))
    prepared = qkernels.prepare(model, IMAGE)
    check_same(model, prepared, IMAGE)


def test_an_in_place_module_that_is_called_twice_keeps_its_meaning():
    def forward(self, x):
        a = self.relu(self.first(x))
        b = self.last(a)
        return self.relu(b) + b

    layers = {"first": nn.Conv2d(4, 4, 1), "last": nn.Conv2d(4, 4, 1)}
    model = model_of(forward, **layers, relu=nn.ReLU(inplace=True))
    prepared = qkernels.prepare(model, IMAGE)
    check_same(model, prepared, IMAGE)
    assert all(row.integer for row in prepared.report), prepared.report


def test_a_model_with_data_dependent_control_flow_is_prepared_in_parts():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.width = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), 4

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if x.mean() > 100.0:
                return x
        return self.head(x.flatten(1)) * self.blocks[0].width

    model = model_of(forward, blocks=nn.ModuleList([Block(), Block()]), head=nn.Linear(256, 2))
    prepared = qkernels.prepare(model, IMAGE)
    check_same(model, prepared, IMAGE)
    assert [row.name for row in prepared.report.integer] == ["blocks.0.conv", "blocks.1.conv", "head"]
    assert "control flow" in prepared.report.stayed_float[0].reason
    with qkernels.calibrating(prepared):
        prepared(IMAGE)
    assert all(q.state is State.FAKE_QUANT for q in prepared.modules() if isinstance(q, Quantizer))


def test_other_sizes_work_after_prepare():
    model = randomized(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    )
    prepared = qkernels.prepare(model, IMAGE)
    check_same(model, prepared, torch.randn(5, 4, 17, 13))


def test_calibration_ends_in_fake_quant_and_an_exception_changes_nothing():
    model = randomized(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)))
    prepared = qkernels.prepare(model, IMAGE)

    def interrupt(model, batch):
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qkernels.calibrate(prepared, [IMAGE], forward=interrupt)
    assert all(q.state is State.OFF and not q.has_grid() for q in prepared.modules() if isinstance(q, Quantizer))
    with qkernels.calibrating(prepared):
        torch.testing.assert_close(prepared(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)
    before = {name: t.clone() for name, t in prepared.state_dict().items()}
    rounded = prepared(IMAGE)
    assert not torch.equal(rounded, model(IMAGE))
    with pytest.raises(ValueError, match=r"output of input has 1 NaN"), qkernels.calibrating(prepared):
        prepared(IMAGE.masked_fill(IMAGE.flatten()[0] == IMAGE, float("nan")))
    assert all(torch.equal(t, before[name]) for name, t in prepared.state_dict().items())
    assert torch.equal(prepared(IMAGE), rounded)


def test_frozen_grids_survive_calibration():
    prepared = qkernels.prepare(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    with qkernels.calibrating(prepared):
        prepared(torch.randn(10, 4))
    first = next(q for q in prepared.modules() if isinstance(q, Quantizer))
    first.state, grid = State.FROZEN, first.qparams()
    with qkernels.calibrating(prepared):
        prepared(100 * torch.randn(10, 4))
    assert first.qparams() == grid
    assert first.state is State.FROZEN


def test_the_prepared_state_dict_round_trips():
    model = randomized(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)))
    prepared = qkernels.prepare(model, IMAGE)
    qkernels.calibrate(prepared, [IMAGE])
    again = qkernels.prepare(model, IMAGE)
    again.load_state_dict(prepared.state_dict())
    assert torch.equal(again(IMAGE), prepared(IMAGE))
    assert torch.equal(copy.deepcopy(prepared)(IMAGE), prepared(IMAGE))
    assert copy.deepcopy(prepared).report is not None


def test_recipe_overrides_reach_the_quantizers():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    prepared = qkernels.prepare(model, IMAGE, observer="minmax", weight_granularity="per_tensor", bits=4)
    found = [q for q in prepared.modules() if isinstance(q, Quantizer)]
    assert {q.recipe.observer for q in found} == {"minmax"}
    assert {q.spec.qmax for q in found} == {15, 7}
    assert not any(q.spec.per_channel for q in found)


def test_an_example_with_history_is_fine():
    example = nn.Conv2d(4, 4, 1)(IMAGE)
    assert example.requires_grad
    prepared = qkernels.prepare(nn.Sequential(nn.Conv2d(4, 2, 1)).eval(), example)
    assert kinds_of(prepared) == ["conv"]


def test_skipping_a_class_of_ones_own():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.conv(x))

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Gate(), nn.Conv2d(4, 4, 1)).eval()
    prepared = qkernels.prepare(model, IMAGE, skip=[Gate])
    assert kinds_of(prepared) == ["conv", "conv"]
    assert [row.name for row in prepared.report.stayed_float] == ["1.conv", "1.sigmoid", "1.mul"]
    check_same(model, prepared, IMAGE)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("fearures.0", "has the name 'fearures.0'; did you mean 'features.0'"),
        (re.compile("head.*"), "has the regex 'head"),
    ],
)
@pytest.mark.parametrize("verb", [qkernels.prepare, qkernels.prepare_qat])
def test_a_skipped_name_that_nothing_has_is_refused(verb, skip, message):
    features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model = nn.Sequential(OrderedDict(features=features, pool=nn.MaxPool2d(2))).eval()
    with pytest.raises(InvalidArgument, match=message):
        verb(model, IMAGE, skip=[skip])
    verb(model, IMAGE, skip=["features.1", nn.LSTM])  # a type may be for other models


def test_calibrate_takes_loaders_with_labels():
    prepared = qkernels.prepare(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    loader = [[torch.randn(3, 4), torch.zeros(3)] for _ in range(2)]
    qkernels.calibrate(prepared, loader, forward=lambda model, batch: model(batch[0]))
    assert prepared(torch.randn(1, 4)).shape == (1, 4)


def test_batches_that_hold_labels_too_are_refused_by_name():
    model = nn.Linear(4, 4).eval()
    loader = [[torch.randn(3, 4), torch.zeros(3)] for _ in range(2)]
    prepared = qkernels.prepare(model, torch.randn(2, 4))
    with pytest.raises(InvalidArgument, match=r"a batch of 2 arguments does not fit forward.*for images, _ in loader"):
        qkernels.calibrate(prepared, loader)
    qkernels.calibrate(prepared, (rows for rows, _ in loader))
    converted = qkernels.convert(prepared)
    for verb, first in ((qkernels.verify, prepared), (qkernels.compare, model)):
        with pytest.raises(InvalidArgument, match="a batch of 2 arguments does not fit"):
            verb(first, converted, loader)
    assert qkernels.verify(prepared, converted, (rows for rows, _ in loader)).total_mismatches == 0


def test_misuse_is_explained():
    linear = nn.Linear(4, 4).eval()
    with pytest.raises(InvalidType, match="function"):
        qkernels.prepare(lambda x: x, torch.randn(2, 4))
    with pytest.raises(InvalidArgument, match="example_inputs do not fit"):
        qkernels.prepare(linear, (torch.randn(2, 4), 1, 2, 3))
    prepared = qkernels.prepare(linear, torch.randn(2, 4))
    with pytest.raises(InvalidArgument, match="prepared already"):
        qkernels.prepare(prepared, torch.randn(2, 4))
    with pytest.raises(InvalidState, match="calibrating"):
        qkernels.convert(prepared)
    with pytest.raises(InvalidArgument, match="prepare"):
        qkernels.convert(linear)
    with pytest.raises(ValueError, match="no data"), qkernels.calibrating(prepared):
        pass
    with pytest.raises(InvalidArgument, match="prepare"), qkernels.calibrating(linear):
        pass
