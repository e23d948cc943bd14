"""The journey of post-training quantization: prepare, calibrate, convert, verify, with public names only."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels


class Block(nn.Module):
    """Inverted residual with squeeze and excitation, functional and module calls mixed."""

    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.act = nn.ReLU6(inplace=True)
        self.squeeze = nn.Linear(2 * channels, channels)
        self.excite = nn.Linear(channels, 2 * channels)
        self.project = nn.Conv2d(2 * channels, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.act(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.depthwise(y)))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()
        y = y * gate.unsqueeze(-1).unsqueeze(-1)
        y = self.bn3(self.project(y))
        y += x
        return F.relu(y)


class Network(nn.Module):
    """Residuals, depthwise, transposed convolution, cat, pools, channel shuffle, hardswish, padding, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Block(16)
        self.block2 = Block(16, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.up_bn = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8 + 16, 16, 3, padding="same", dilation=2)
        self.pool = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        x = F.hardswish(self.bn(self.stem(x)))
        skip = self.block2(self.block1(x))
        low = F.max_pool2d(skip, 2)
        n, c, h, w = low.shape
        low = low.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        up = F.silu(self.up_bn(self.up(low)))
        x = torch.cat([up, skip], dim=1)
        x = F.leaky_relu(self.mix(x), 0.1)
        x = self.pool(F.interpolate(x, scale_factor=2))
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(self.dropout(features)), features


def batches(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def trained(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0.0, 0.3)
    return model.eval()


def quantized(model: nn.Module, shape: tuple[int, ...], **options) -> tuple[nn.Module, nn.Module]:
    prepared = qkernels.prepare(model, torch.randn(shape), **options)
    qkernels.calibrate(prepared, batches(3, *shape))
    return prepared, qkernels.convert(prepared)


def sqnr(expected: torch.Tensor, got: torch.Tensor) -> float:
    return 10 * torch.log10(expected.square().sum() / (got - expected).square().sum()).item()


@pytest.fixture(scope="module")
def network():
    model = trained(Network())
    return (model, *quantized(model, (4, 3, 32, 32)))


def test_the_converted_network_is_integer_and_close_to_the_float_one(network):
    model, prepared, converted = network
    assert [row.kind for row in prepared.report.stayed_float] == ["pad"]  # before the first grid
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) for m in converted.modules())
    x = batches(1, 8, 3, 32, 32, seed=5)[0]
    with torch.no_grad():
        expected, simulated, got = model(x), prepared(x), converted(x)
    for e, s, g in zip(expected, simulated, got, strict=True):
        assert sqnr(e, s) > 20
        assert sqnr(e, g) > 20
        assert sqnr(s, g) > 25


def test_verify_finds_no_difference_on_any_isa(network, isa):
    _, prepared, converted = network
    report = qkernels.verify(prepared, converted, batches(2, 3, 3, 32, 32, seed=2))
    assert report.total_mismatches == 0, str(report)
    assert report
    assert {"stem", "block2.depthwise", "up", "mix", "head"} <= {layer.name for layer in report.layers}
    assert "0 of" in str(report)


def test_exact_gives_the_bits_of_the_converted_network(network):
    _, prepared, converted = network
    x = batches(1, 2, 3, 32, 32, seed=3)[0]
    for engine in ("reference", "kernels"):
        for expected, got in zip(qkernels.exact(prepared, engine=engine)(x), converted(x), strict=True):
            assert torch.equal(expected, got)


def test_other_batch_and_image_sizes(network):
    _, prepared, converted = network
    for shape in [(1, 3, 32, 32), (3, 3, 48, 40), (0, 3, 32, 32)]:
        assert qkernels.verify(prepared, converted, batches(1, *shape)).total_mismatches == 0


def test_verify_finds_one_changed_weight_and_says_where(network):
    _, prepared, converted = network
    broken = copy.deepcopy(converted)
    weight = broken.get_submodule("block2.project").weight
    weight[3, 7] += 9
    report = qkernels.verify(prepared, broken, batches(1, 2, 3, 32, 32))
    assert report.total_mismatches > 0
    assert next(layer.name for layer in report.layers if layer.differing) == "block2.project"


def test_input_layouts_give_the_same_bits(network):
    *_, converted = network
    x = batches(1, 2, 3, 32, 32)[0]
    expected = converted(x)[0]
    assert torch.equal(converted(x.to(memory_format=torch.channels_last))[0], expected)
    assert torch.equal(converted(x.transpose(2, 3).contiguous().transpose(2, 3))[0], expected)


def test_inference_mode_deepcopy_and_state_dict(network):
    model, _, converted = network
    x = batches(1, 2, 3, 32, 32)[0]
    expected = converted(x)[0]
    with torch.inference_mode():
        assert torch.equal(converted(x)[0], expected)
    assert torch.equal(copy.deepcopy(converted)(x)[0], expected)
    other = qkernels.prepare(model, x)
    qkernels.calibrate(other, [10.0 * x])
    fresh = qkernels.convert(other)
    assert not torch.equal(fresh(x)[0], expected)
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(fresh(x)[0], expected)


def test_prepared_and_converted_networks_pickle(network):
    _, prepared, converted = network
    x = batches(1, 2, 3, 32, 32)[0]
    again = pickle.loads(pickle.dumps(prepared))
    assert again.report == prepared.report
    assert torch.equal(qkernels.convert(again)(x)[0], converted(x)[0])
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x)[0], converted(x)[0])


def test_save_and_load(network, tmp_path):
    _, prepared, converted = network
    qkernels.save(converted, tmp_path / "network.safetensors")
    loaded = qkernels.load(tmp_path / "network.safetensors")
    assert qkernels.verify(prepared, loaded, batches(1, 2, 3, 32, 32)).total_mismatches == 0


def test_sixteen_threads_on_one_converted_network_agree(network):
    *_, converted = network
    model = copy.deepcopy(converted)  # nothing packed yet
    inputs = batches(4, 2, 3, 32, 32, seed=9)
    expected = [converted(x)[0] for x in inputs]
    failures = []

    def work(number: int) -> None:
        try:
            for i in range(4):
                index = (number + i) % len(inputs)
                if not torch.equal(model(inputs[index])[0], expected[index]):
                    failures.append(f"thread {number}: other bits")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "options",
    [
        {"observer": "minmax"},
        {"observer": "moving_average"},
        {"observer": "percentile", "observer_options": {"percentile": 99.9}},
        {"observer": "mse"},
        {"weight_granularity": "per_tensor"},
        {"symmetric_activations": True},
        {"weight_bits": 4},
        {"bits": 6},
    ],
    ids=str,
)
def test_every_recipe_verifies(options):
    prepared, converted = quantized(trained(Network()), (2, 3, 32, 32), **options)
    report = qkernels.verify(prepared, converted, batches(1, 2, 3, 32, 32, seed=4))
    assert report.total_mismatches == 0, str(report)


@pytest.mark.parametrize("limits", [(1.0, 2.0), (-3.0, -1.0), (0.2, 0.3), (-0.1, 6.0)])
@pytest.mark.parametrize("shape", ["conv", "add"])
def test_a_fused_clamp_may_leave_few_codes_and_none_for_zero(limits, shape):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Hardtanh(*limits), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.first(x)
            return self.last(self.act(y + x.sum(1, keepdim=True) if shape == "add" else y))

    torch.manual_seed(0)
    prepared, converted = quantized(Model().eval(), (2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    assert torch.allclose(converted(x), prepared(x), atol=1e-2)
    assert torch.equal(qkernels.compile(converted, x)(x), converted(x))


def test_int8_activations():
    spec = qkernels.QSpec.activation(dtype=torch.int8)
    recipe = qkernels.Recipe(activation=qkernels.core.recipe.TensorRecipe(spec, "minmax"))
    prepared, converted = quantized(trained(Network()), (2, 3, 32, 32), recipe=recipe)
    assert qkernels.verify(prepared, converted, batches(1, 2, 3, 32, 32)).total_mismatches == 0


class Recurrent(nn.Module):
    """No graph: the number of steps depends on the data. `norm` and the loop stay float."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.norm = nn.LayerNorm(8)
        self.step = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 2)})

    def forward(self, x):
        h = self.encoder(x).mean(-1)
        steps = 0
        while h.norm() > 1.0 and steps < 5:
            h = 0.5 * torch.tanh(self.step(self.norm(h)))
            steps += 1
        return {name: head(h) for name, head in self.heads.items()}


def test_a_network_without_a_graph_is_quantized_in_parts(tmp_path):
    model = trained(Recurrent())
    prepared, converted = quantized(model, (4, 4, 10))
    assert [row.name for row in prepared.report.integer] == ["encoder.0", "step", "heads.a", "heads.b"]
    assert "no graph" in str(prepared.report)
    x = batches(1, 4, 4, 10, seed=7)[0]
    for name, expected in model(x).items():
        assert sqnr(expected, converted(x)[name]) > 15
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0
    exact = qkernels.exact(prepared)(x)
    assert all(torch.equal(exact[name], out) for name, out in converted(x).items())
    qkernels.save(converted, tmp_path / "model.safetensors")
    loaded = qkernels.load(tmp_path / "model.safetensors", skeleton=Recurrent())
    assert all(torch.equal(loaded(x)[name], out) for name, out in converted(x).items())


def test_a_function_not_defined_on_the_chosen_grid_stays_float():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.sqrt(F.relu(self.first(x))))

    for symmetric in (False, True):  # a symmetric grid has codes for negative numbers
        prepared, converted = quantized(Model().eval(), (5, 4), symmetric_activations=symmetric)
        assert not prepared.report.stayed_float
        assert [row.name for row in converted.report.stayed_float] == (["sqrt"] if symmetric else [])
        assert qkernels.verify(prepared, converted, batches(1, 5, 4)).total_mismatches == 0


class Attention(nn.Module):
    """A transformer layer: matmul, softmax and layer norm stay float, projections and the MLP are integer."""

    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.heads = heads

    def forward(self, x):
        x = x + self.position
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5).softmax(dim=-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def test_a_transformer_layer_has_float_islands():
    model = Attention().eval()
    prepared, converted = quantized(model, (3, 5, 16))
    kinds = {row.kind for row in prepared.report.stayed_float}
    assert {"LayerNorm", "matmul", "softmax"} <= kinds
    x = batches(1, 3, 5, 16, seed=7)[0]
    assert sqnr(model(x), converted(x)) > 25
    assert qkernels.verify(prepared, converted, [x]).total_mismatches == 0


class TwoBranches(nn.Module):
    """A shared module on two inputs, weights tied, x + x, scalar arithmetic, constants."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.shared.weight
        self.register_buffer("offset", torch.tensor([0.5, -0.5, 0.0, 1.0, 2.0, -1.0]))

    def forward(self, x, y):
        a, b = F.relu(self.shared(x)), self.shared(y) * 0.5
        c = torch.clamp(a + b + self.offset, -1.0, 2.0)
        d = (c + c) - 1.0
        return self.tied(d), (c, [d, x])


def test_shared_modules_tied_weights_and_nested_outputs():
    model = TwoBranches().eval()
    x, y = batches(2, 7, 6)
    prepared = qkernels.prepare(model, (x, y))
    qkernels.calibrate(prepared, [(x, y), {"x": y, "y": x}])
    converted = qkernels.convert(prepared)
    expected, got = model(x, y), converted(x, y)
    assert sqnr(expected[0], got[0]) > 25
    assert sqnr(expected[1][0], got[1][0]) > 25
    assert torch.equal(got[1][1][1], x)
    assert qkernels.verify(prepared, converted, [(x, y)]).total_mismatches == 0


def test_a_network_with_nothing_to_quantize_stays_as_it_is():
    model = nn.Sequential(nn.LayerNorm(4), nn.Softmax(-1)).eval()
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="stays float"):
        prepared = qkernels.prepare(model, x)
    qkernels.calibrate(prepared, [x])
    converted = qkernels.convert(prepared)
    assert torch.equal(converted(x), model(x))
